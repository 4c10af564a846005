"""The two hubs, through their own libraries: what a repository holds, and where each file is.

Listing, addresses and login are theirs. The bytes are ours (wire.py): modelscope drops its running
hash when it resumes and takes cached files unhashed; huggingface_hub hashes nothing over plain HTTP.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from convert.wire import Place
from engine.errors import FetchError
from engine.registry import Model, Repository


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of a repository as its hub describes it; git_sha1 is git's own id of a file that is not in LFS."""

    name: str
    n_bytes: int
    sha256: str | None
    git_sha1: str | None
    place: Place


def list_files(source: str, spec: Model) -> Mapping[str, Listed]:
    """The files at the top of a model's repository, by name; FetchError says why there are none."""
    repository = spec.sources[source]
    with _quiet():
        try:
            listed = HUBS[source](repository)
        except FetchError:
            raise
        except Exception as error:  # each library has a dozen kinds of its own
            raise FetchError(f"{source}: {repository.repo} at {repository.revision}: {_reason(error)}") from error
    return {file.name: file for file in listed if "/" not in file.name}


def _modelscope(repository: Repository) -> list[Listed]:
    from modelscope_hub.api import HubApi

    api = HubApi()
    files = api.list_repo_files(repository.repo, "model", revision=repository.revision)

    def place(path: str) -> Place:
        url = api.legacy.get_download_url(repository.repo, "model", path, repository.revision)
        return Place("modelscope", url)

    return [Listed(file.path, int(file.size or 0), file.sha256, None, place(file.path)) for file in files]


def _huggingface(repository: Repository) -> list[Listed]:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    info = HfApi().model_info(repository.repo, revision=repository.revision, files_metadata=True, timeout=30)
    headers = {key: str(value) for key, value in build_hf_headers().items()}

    def place(path: str) -> Place:
        url = hf_hub_url(repository.repo, path, revision=repository.revision)
        return Place("huggingface", url, headers)

    return [
        Listed(
            file.rfilename,
            int((file.lfs.size if file.lfs else file.size) or 0),
            file.lfs.sha256 if file.lfs else None,
            None if file.lfs else file.blob_id,
            place(file.rfilename),
        )
        for file in info.siblings or ()
    ]


HUBS: Mapping[str, Callable[[Repository], list[Listed]]] = {"modelscope": _modelscope, "huggingface": _huggingface}


def _reason(error: Exception) -> str:
    """A library's error as a phrase with what to do."""
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(error, "http_status", None)
    status = status or getattr(response, "status_code", None)
    if status in (401, 403):
        return f"access is refused (HTTP {status}): log in with the hub's own command, or use the other --source"
    if status == 404 or "NotExist" in type(error).__name__ or "NotFound" in type(error).__name__:
        return "there is no such repository or revision (HTTP 404): use the other --source"
    if status:
        return f"the hub answers HTTP {status}: try again later, or use the other --source"
    return f"it cannot be reached ({type(error).__name__}): check the connection, or use the other --source"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both libraries talk to the terminal; what matters is in the errors that they raise."""
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
