"""Rows of floats to blocks, through the quantizer of ggml that llama-cpp-python installs.

The library is opened alone, without llama_cpp or llama.cpp: a converter needs neither, and its
memory is ours to promise. ctypes drops the GIL in every call, so threads run side by side.
Rows are independent: how they are cut into slices cannot change a byte.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.errors import CheckpointError, NativeError

PINNED = "0.3.36"  # of llama-cpp-python, as in pyproject.toml
SIXTEEN_BIT_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80}  # all ones in it: not a finite number
CHECKED_AT_ONCE = 1 << 16  # values: what a cache holds, and no allocation that the kernel must clear
SOURCE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_LIBRARY_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
_FLOAT_POINTER, _I64, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "ggml_quantize_chunk": (
        _SIZE,
        [ctypes.c_int, _FLOAT_POINTER, ctypes.c_void_p, _I64, _I64, _I64, ctypes.c_void_p],
    ),
    "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, _SIZE]),
    "ggml_fp16_to_fp32_row": (None, [ctypes.c_void_p, ctypes.c_void_p, _I64]),
    "ggml_bf16_to_fp32_row": (None, [ctypes.c_void_p, ctypes.c_void_p, _I64]),
    "ggml_fp32_to_fp16_row": (None, [ctypes.c_void_p, ctypes.c_void_p, _I64]),
    "ggml_fp32_to_bf16_row": (None, [ctypes.c_void_p, ctypes.c_void_p, _I64]),
    **{
        f"dequantize_row_{name}": (None, [ctypes.c_void_p, ctypes.c_void_p, _I64])
        for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_K", "q5_K", "q6_K")
    },
}


def row_bytes(qtype: str, n_per_row: int) -> int:
    """Bytes of one row of n_per_row values; ValueError when they are not whole blocks."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[qtype]]
    if n_per_row % block:
        raise ValueError(f"{n_per_row} values are not whole blocks of {block} ({qtype})")
    return int(n_per_row // block * block_bytes)


def first_non_finite(dtype: str, raw: np.ndarray) -> int | None:
    """Index of the first NaN or infinity among values of a source type, None where all are finite.

    raw: (n_bytes,) uint8 of F16, BF16 or F32 values. Looks at exponents only, two bytes a value.
    """
    if dtype == "F32":
        finite = np.isfinite(raw.view(np.float32))
        return None if finite.all() else int(np.argmin(finite))
    exponent = np.uint16(SIXTEEN_BIT_EXPONENT[dtype])
    values = raw.view(np.uint16)
    for start in range(0, values.size, CHECKED_AT_ONCE):
        bad = (values[start : start + CHECKED_AT_ONCE] & exponent) == exponent
        if bad.any():
            return start + int(np.argmax(bad))
    return None


def widen(dtype: str, raw: np.ndarray, rows: np.ndarray) -> None:
    """Values of a source type (uint8 bytes) to float32, into rows; exact for all three types."""
    if raw.nbytes != rows.size * SOURCE_BYTES[dtype]:
        raise ValueError(f"{raw.nbytes} bytes of {dtype} are not {rows.size} values")
    if dtype == "F32":
        rows.reshape(-1)[:] = raw.view(np.float32)
        return
    function = library().ggml_fp16_to_fp32_row if dtype == "F16" else library().ggml_bf16_to_fp32_row
    function(_address(raw), _address(rows), rows.size)


def quantize_rows(qtype: str, rows: np.ndarray, out: np.ndarray) -> None:
    """Quantize rows (n_rows, n_per_row) float32 into out (n_rows * row_bytes,) uint8.

    Source: ggml_quantize_chunk, ggml/src/ggml.c. CheckpointError where a block comes out invalid.
    """
    n_rows, n_per_row = rows.shape
    if out.nbytes != n_rows * row_bytes(qtype, n_per_row) or not rows.flags.c_contiguous or rows.dtype != np.float32:
        raise ValueError(f"{rows.shape} {rows.dtype} rows do not fit {out.nbytes} bytes of {qtype}")
    if qtype == "F32":
        out.view(np.float32)[:] = rows.reshape(-1)
        return
    lib, number = library(), int(GGMLQuantizationType[qtype])
    if qtype in ("F16", "BF16"):
        narrow = lib.ggml_fp32_to_fp16_row if qtype == "F16" else lib.ggml_fp32_to_bf16_row
        narrow(_address(rows), _address(out), rows.size)
    else:
        lib.ggml_quantize_chunk(number, _address(rows), _address(out), 0, n_rows, n_per_row, None)
    if not lib.ggml_validate_row_data(number, _address(out), out.nbytes):
        raise CheckpointError(f"the values are too large for {qtype}: a block has no finite scale; choose BF16")


def dequantize_rows(qtype: str, raw: np.ndarray, rows: np.ndarray) -> None:
    """Bytes of whole rows (uint8) back to float32, into rows (n_rows, n_per_row)."""
    if raw.nbytes != rows.shape[0] * row_bytes(qtype, rows.shape[1]):
        raise ValueError(f"{raw.nbytes} bytes of {qtype} are not {rows.shape}")
    if qtype in SOURCE_BYTES:
        widen(qtype, raw, rows)
    else:
        name = "dequantize_row_" + qtype.lower().replace("_k", "_K")
        getattr(library(), name)(_address(raw), _address(rows), rows.size)


def blocks_are_valid(qtype: str, raw: np.ndarray) -> bool:
    """Whether all blocks (uint8 bytes, whole ones) hold finite scales and values."""
    return bool(library().ggml_validate_row_data(int(GGMLQuantizationType[qtype]), _address(raw), raw.nbytes))


@functools.cache
def library() -> ctypes.CDLL:
    """ggml's base library, its symbols and version checked; NativeError says what is missing."""
    installed = _installed_version()
    if installed != PINNED:
        raise NativeError(f"llama-cpp-python {installed} is installed, {PINNED} is needed: run make setup")
    path = _library_path()
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"{path} cannot be loaded ({error}): run make clean && make setup") from error
    for name, (result, arguments) in _SIGNATURES.items():
        if not hasattr(lib, name):
            raise NativeError(f"{path} has no symbol {name}: run make clean && make setup")
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def _library_path() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    folders = [Path(place) / "lib" for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for name in _LIBRARY_NAMES:
            if (folder / name).exists():
                return folder / name
    raise NativeError(f"llama-cpp-python has no ggml library in {folders}: run make clean && make setup")


def _address(array: np.ndarray) -> int:
    return array.ctypes.data
