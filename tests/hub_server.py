"""Both hubs on loopback: their URL layout and JSON, and every way that a server can misbehave, on cue.

    with HubServer({"owner/name": {"config.json": b"..."}}) as hub:
        hub.misbehave("config.json", Fault("drop", 10), Fault("status", 500))
        subprocess.run([...], env=os.environ | hub.environment)

Sources of the layout: modelscope_hub/_legacy_api.py, huggingface_hub/{hf_api,file_download}.py, and
what the two sites answer. HF's resolve answers with a redirect, as the real one does for LFS files.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "93a65d34827a3cc269b727e67004743b723e2f83"
Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Fault:
    """One answer that goes wrong.

    drop: break off after `number` bytes. ignore_range: 200 and everything. status: that status.
    longer: claim a file of `number` bytes more. flip: another byte at `number` of the file.
    slow: `number` bytes a second. empty: headers, then nothing. wrong_range: bytes from elsewhere.
    """

    kind: str
    number: int = 0


class HubServer:
    """Both hubs, each with the same repositories; faults are used up in order, one a request of that file."""

    def __init__(self, repositories: Mapping[str, Files], *, lists_sha256: bool = True) -> None:
        self.repositories, self.lists_sha256 = repositories, lists_sha256
        self.faults: dict[tuple[str, str], collections.deque[Fault]] = collections.defaultdict(collections.deque)
        self.always: dict[tuple[str, str], Fault] = {}
        self.requests: list[tuple[str, str, str]] = []  # hub, file, Range
        self.sent_bytes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def cdn(self) -> str:
        """Where the Hugging Face hub sends one for bytes: another host, as with the real one."""
        return f"http://localhost:{self._server.server_port}/cdn"

    @property
    def environment(self) -> dict[str, str]:
        """What points both libraries here, and keeps proxies out of it."""
        return {
            "MODELSCOPE_ENDPOINT": f"{self.url}/modelscope",
            "HF_ENDPOINT": f"{self.url}/huggingface",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def misbehave(self, name: str, *faults: Fault, hub: str = "modelscope", always: bool = False) -> None:
        """Answer the next requests of a file on a hub with these faults; always: every later one, too."""
        self.faults[hub, name].extend(faults)
        if always:
            self.always[hub, name] = faults[-1]

    def fault(self, hub: str, name: str) -> Fault | None:
        waiting = self.faults[hub, name]
        return waiting.popleft() if waiting else self.always.get((hub, name))

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".model"))


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            try:
                self._route()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _route(self) -> None:
            parsed = urlparse(self.path)
            side, _, path = unquote(parsed.path).lstrip("/").partition("/")
            query = {key: values[0] for key, values in parse_qs(parsed.query).items()}
            routes = {
                ("modelscope", r"api/v1/models/([^/]+/[^/]+)/repo/files"): self._modelscope_files,
                ("modelscope", r"api/v1/models/([^/]+/[^/]+)/repo"): self._modelscope_file,
                ("modelscope", r"api/v1/models/([^/]+/[^/]+)/revisions"): self._modelscope_revisions,
                ("modelscope", r"api/v1/models/([^/]+/[^/]+)"): self._modelscope_model,
                ("huggingface", r"api/models/([^/]+/[^/]+)/revision/([^/]+)"): self._huggingface_model,
                ("huggingface", r"api/models/([^/]+/[^/]+)/tree/([^/]+)"): self._huggingface_tree,
                ("huggingface", r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)"): self._huggingface_resolve,
                ("cdn", r"([^/]+/[^/]+)/(.+)"): self._huggingface_bytes,
            }
            for (wanted, pattern), action in routes.items():
                found = re.fullmatch(pattern, path)
                if side == wanted and found:
                    listing = hub.fault(side, "*") if "file" not in action.__name__ else None
                    if listing:
                        return self._json(listing.number, {"Code": listing.number, "Message": "refused"})
                    if found[1] not in hub.repositories:
                        return self._json(404, {"Code": 10010205001, "Message": "not found", "error": "not found"})
                    return action(query, *found.groups())
            return self._json(404, {"Code": 404, "Message": f"no route {self.path}"})

        def _modelscope_files(self, query: dict[str, str], repo: str) -> None:
            listing = hub.fault("modelscope", "*")
            if listing:
                return self._json(listing.number, {"Code": listing.number, "Message": "refused"})
            files = [
                {"Name": name, "Path": name, "Size": len(data), "Type": "blob", "Revision": COMMIT}
                | ({"Sha256": sha256(data)} if hub.lists_sha256 else {})
                for name, data in hub.repositories[repo].items()
            ]
            return self._json(200, {"Code": 200, "Success": True, "Data": {"Files": files}})

        def _modelscope_revisions(self, query: dict[str, str], repo: str) -> None:
            branches = {"Branches": [{"Revision": "master", "CreatedAt": 1}], "Tags": []}
            self._json(200, {"Code": 200, "Success": True, "Data": {"RevisionMap": branches}})

        def _modelscope_model(self, query: dict[str, str], repo: str) -> None:
            owner, name = repo.split("/")
            self._json(200, {"Code": 200, "Success": True, "Data": {"Id": 1, "Path": owner, "Name": name}})

        def _modelscope_file(self, query: dict[str, str], repo: str) -> None:
            self._bytes("modelscope", repo, query.get("FilePath", ""))

        def _huggingface_model(self, query: dict[str, str], repo: str, revision: str) -> None:
            siblings = []
            for name, data in hub.repositories[repo].items():
                entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
                if is_lfs(name) and hub.lists_sha256:
                    entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            self._json(200, {"id": repo, "modelId": repo, "sha": revision, "private": False, "siblings": siblings})

        def _huggingface_tree(self, query: dict[str, str], repo: str, revision: str) -> None:
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
                | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if is_lfs(name) else {})
                for name, data in hub.repositories[repo].items()
            ]
            self._json(200, files)

        def _huggingface_resolve(self, query: dict[str, str], repo: str, revision: str, name: str) -> None:
            data = hub.repositories[repo].get(name)
            if data is None:
                return self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            headers = {"X-Repo-Commit": revision, "ETag": f'"{git_sha1(data)}"'}
            if is_lfs(name):
                headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            return self._json(302, {}, headers | {"Location": f"{hub.cdn}/{repo}/{name}"})

        def _huggingface_bytes(self, query: dict[str, str], repo: str, name: str) -> None:
            self._bytes("huggingface", repo, name)

        def _json(self, status: int, content: object, headers: Mapping[str, str] | None = None) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _bytes(self, side: str, repo: str, name: str) -> None:
            data, wanted = hub.repositories[repo].get(name), self.headers.get("Range", "")
            hub.requests.append((side, name, wanted))
            fault = (hub.fault(side, name) if self.command == "GET" else None) or Fault("none")
            if fault.kind == "status":
                return self._json(fault.number, {"error": "on cue"})
            if data is None:
                return self._json(404, {"error": "no such file"})
            if fault.kind == "flip":
                data = data[: fault.number] + bytes([data[fault.number] ^ 1]) + data[fault.number + 1 :]
            self._answer(data, wanted, fault)
            return None

        def _answer(self, data: bytes, wanted: str, fault: Fault) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
            start, stop, total = 0, len(data), len(data) + (fault.number if fault.kind == "longer" else 0)
            if found and fault.kind != "ignore_range":
                start, stop = int(found[1]), min(int(found[2] or len(data) - 1) + 1, len(data))
                self.send_response(206)
                shift = 7 if fault.kind == "wrong_range" else 0
                self.send_header("Content-Range", f"bytes {start + shift}-{stop + shift - 1}/{total}")
                self.send_header("Content-Length", str(stop - start))
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(total))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{sha256(data)}"')
            self.end_headers()
            if self.command != "HEAD":
                self._send(data[start:stop], fault)

        def _send(self, data: bytes, fault: Fault) -> None:
            if fault.kind in ("drop", "empty"):
                data = data[: fault.number]
                self.close_connection = True
            step = max(1, fault.number // 20) if fault.kind == "slow" else 1 << 16
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                hub.sent_bytes += len(data[start : start + step])
                if fault.kind == "slow":
                    time.sleep(step / fault.number)
            if self.close_connection:
                self.wfile.flush()
                self.connection.close()

    return Handler
