"""What this machine and set-up are, and what is wrong with them: each problem with its remedy."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.errors import NativeError
from engine.fit import estimate
from engine.home import checkpoint_folder, home, quantized_files
from engine.host import cpu_flags, cpu_name, disk_free_bytes, memory, physical_cores, usable_cores
from engine.registry import checkpoints

# llama.cpp's name of a feature -> the kernel's flag of a CPU that has it
FEATURE_FLAGS = {
    "AVX": "avx",
    "AVX2": "avx2",
    "F16C": "f16c",
    "FMA": "fma",
    "BMI2": "bmi2",
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "NEON": "asimd",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
}
REBUILD = "make clean && make setup compiles llama.cpp for this CPU"
SMALLEST_BITS_PER_WEIGHT = 4.5  # of a Q4 mixture, for what a model will take before there is a file
DISK_BYTES = 6_000_000_000  # the largest of our quantized models, and some room
N_CTX = 2048


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; a remedy makes it a problem."""

    topic: str
    text: str
    remedy: str | None = None


def examine() -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    return [finding for check in CHECKS for finding in check()]


def compare_features(built: str, flags: frozenset[str]) -> list[Finding]:
    """Features that llama.cpp was compiled with against the CPU's flags; nothing to say where no flags are known."""
    compiled = {name for name, value in re.findall(r"(\w+) = (\d)", built) if value == "1"}
    if not flags:
        return []
    unused = [name for name, flag in FEATURE_FLAGS.items() if flag in flags and name not in compiled]
    impossible = [name for name, flag in FEATURE_FLAGS.items() if flag not in flags and name in compiled]
    findings = []
    if unused:
        findings.append(Finding("llama.cpp", f"does not use what this CPU has: {', '.join(unused)}", REBUILD))
    if impossible:
        findings.append(Finding("llama.cpp", f"needs what this CPU lacks: {', '.join(impossible)}", REBUILD))
    return findings


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    is_known = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Finding("Python", version, None if is_known else "set PYTHON to 3.10 to 3.13 and make clean && make setup")
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            yield Finding(
                "compiler", f"no {tool} on the path", f"install it before compiling again (apt install {tool})"
            )


def _cpu() -> Iterator[Finding]:
    yield Finding("CPU", f"{cpu_name()}, {physical_cores()} physical cores, {usable_cores()} of them usable here")


def _llama_cpp() -> Iterator[Finding]:
    try:
        from engine import native

        build = native.build_info()
    except NativeError as error:
        yield Finding("llama.cpp", str(error), REBUILD)
        return
    yield Finding("llama.cpp", f"llama-cpp-python {build.version}: {build.flags}")
    yield from compare_features(build.flags, cpu_flags())
    if "OPENMP = 1" not in build.flags:
        yield Finding("llama.cpp", "was compiled without OpenMP: its threads spin while they wait", REBUILD)
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() != "passive":
        yield Finding("threads", f"OMP_WAIT_POLICY={policy}: they spin while they wait", "unset OMP_WAIT_POLICY")


def _memory() -> Iterator[Finding]:
    now = memory()
    limit = "" if now.limit_bytes is None else " (this process's limit)"
    free, total = now.available_bytes / 1e9, now.total_bytes / 1e9
    yield Finding("memory", f"{free:.1f} of {total:.1f} GB free{limit}")
    for spec in checkpoints().values():
        n_weights = spec.shape.n_layer * spec.shape.n_embd * (4 * spec.shape.n_embd + 3 * spec.shape.n_ff)
        weight_bytes = int((n_weights + 2 * spec.shape.n_vocab * spec.shape.n_embd) * SMALLEST_BITS_PER_WEIGHT / 8)
        needed = estimate(spec.shape, weight_bytes, N_CTX, now).needed_bytes
        if needed > now.available_bytes:
            text = f"{spec.title} needs about {needed / 1e9:.1f} GB at {N_CTX} tokens"
            yield Finding("memory", text, "close other programs, or give --ctx less")


def _disk() -> Iterator[Finding]:
    free = disk_free_bytes(home())
    text = f"{free / 1e9:.1f} GB free in the models folder {home()}"
    is_short = free < DISK_BYTES and not any(quantized_files(spec) for spec in checkpoints().values())
    yield Finding("disk", text, "make room, or set FOURBIT_HOME to a larger disk" if is_short else None)


def _models() -> Iterator[Finding]:
    for spec in checkpoints().values():
        files = [path.name for path in quantized_files(spec)]
        is_downloaded = (checkpoint_folder(spec) / "config.json").is_file()
        state = "downloaded" if is_downloaded else "not downloaded"
        text = f"{spec.title}: {state}, {', '.join(files) if files else 'not quantized'}"
        yield Finding("model", text, f"fourbit quantize {spec.key}" if is_downloaded and not files else None)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _cpu, _llama_cpp, _memory, _disk, _models)
