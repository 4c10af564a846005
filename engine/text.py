"""Bytes to text, incrementally: what is given out never changes and nothing is held back without need.

The concatenation of all that decode() and flush() return equals the decoding of all bytes at
once, errors replaced by U+FFFD.
"""

from __future__ import annotations

import codecs


class TextDecoder:
    """UTF-8 with half characters kept until the rest of them comes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, piece: bytes) -> str:
        """The text that is certain after these bytes."""
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for half a character, else nothing."""
        return self._decoder.decode(b"", final=True)
