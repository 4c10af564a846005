"""Byte-pair encoding vocabularies: byte spelling, and merges rebuilt from ranks.

A rank table (tiktoken) says in which order pieces were made but not from which two parts; GGUF
wants the parts. A piece's parts are what encoding it with the pieces of lower rank leaves.
"""

from __future__ import annotations

from collections.abc import Mapping


def byte_spelling() -> list[str]:
    """A printable character for each of the 256 bytes, as GPT-2 spells them.

    Source: bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (n for n in range(256) if n not in printable)
    spelled = {n: chr(n) for n in printable} | {n: chr(256 + i) for i, n in enumerate(others)}
    return [spelled[n] for n in range(256)]


SPELLING = byte_spelling()
UNSPELLING = {character: byte for byte, character in enumerate(SPELLING)}


def spell(piece: bytes) -> str:
    """A piece in GPT-2's printable spelling."""
    return "".join([SPELLING[byte] for byte in piece])


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of each piece longer than a byte, in rank order.

    Where only one split into two ranked pieces exists it is the merge: that decides most of the
    151,387 of Qwen at the cost of a few look-ups each. ValueError for a piece that no merge makes.
    """
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) > 1:
            splits = [
                (piece[:i], piece[i:])
                for i in range(1, len(piece))
                if ranks.get(piece[:i], rank) < rank and ranks.get(piece[i:], rank) < rank
            ]
            merges.append(splits[0] if len(splits) == 1 else _split_by_encoding(ranks, piece, rank))
    return merges


def _split_by_encoding(ranks: Mapping[bytes, int], piece: bytes, below: int) -> tuple[bytes, bytes]:
    """Encode a piece with the pieces ranked below its own: two parts must be left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates)
        if rank >= below:
            raise ValueError(f"no merge makes the piece {piece!r}: its rank {below} is out of order")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
