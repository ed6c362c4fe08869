"""Reads files that Zstandard compressed, frame after frame; a cut one is an error, which the library's reader hides."""

import io
from pathlib import Path
from typing import IO, Any

from megatron_ext.errors import DataError

_BLOCK = 1 << 14
"""Bytes that are decompressed at once: they can become thousands of times as many."""
_LARGEST_WINDOW = 1 << 31
"""As `zstd --long=31` writes."""


class ZstandardFile(io.RawIOBase):
    """What `plain` decompresses to.

    Raises:
        EOFError: the file ends within a frame, or has none of Zstandard's frames.
        DataError: the library is missing.
    """

    def __init__(self, plain: IO[bytes], path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: reading it needs a library: pip install zstandard") from error
        self._plain, self._error = plain, zstandard.ZstdError
        self._library = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._rest, self._out, self._at = b"", b"", 0
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with some of what comes next; 0 at the end."""
        while self._at == len(self._out):
            if not self._decompress():
                return 0
        size = min(len(buffer), len(self._out) - self._at)
        buffer[:size] = self._out[self._at : self._at + size]
        self._at += size
        self._position += size
        return size

    def _decompress(self) -> bool:
        block = self._rest or self._plain.read(_BLOCK)
        self._rest, self._out, self._at = b"", b"", 0
        if not block:
            if self._frame is not None:
                raise EOFError("it ends within a frame")
            return False
        if self._frame is None:
            self._frame = self._library.decompressobj()
        try:
            self._out = self._frame.decompress(block)
        except self._error as error:
            raise EOFError(str(error)) from error
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return True
