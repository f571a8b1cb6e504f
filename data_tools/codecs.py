"""Compressed files, read in bounded memory: what a few bytes can expand to is never held at once."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import zstandard

from data_tools.formats import compression_of
from data_tools.pipes import is_pipe

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
WINDOW_BYTES = 1 << 31  # that a zstd or xz file may refer back to, held in memory: zstd --long=31
MAX_SKIP_BYTES = 2_000_000_000  # of a line that is too long: a few KB may expand to more than anybody waits for
_MAGIC_BYTES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\x00": ".xz", b"BZh": ".bz2"}
_BUFFER_BYTES = 1 << 20
_FEED_BYTES = 512  # of compressed data at once: 4 bytes of zstd expand to 128 KB, so at most 16 MB come out


def decompress(raw: BinaryIO, path: str) -> BinaryIO:
    """What a file holds, given its stored bytes and its name; reading it may raise any of READ_ERRORS."""
    reader: Any
    if is_pipe(path):
        first = cast(io.BufferedReader, raw).peek(max(map(len, _MAGIC_BYTES)))
        suffix = next((suffix for magic, suffix in _MAGIC_BYTES.items() if first.startswith(magic)), None)
    else:
        suffix = compression_of(path)
    match suffix:
        case ".gz":
            reader = gzip.GzipFile(fileobj=raw, mode="rb")
        case ".bz2":
            reader = _Bz2(raw)
        case ".xz":
            reader = _Frames(raw, lambda: lzma.LZMADecompressor(memlimit=WINDOW_BYTES), padding=b"\0")
        case ".zst":
            reader = _Frames(raw, zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj)
        case _:
            return raw
    return cast(BinaryIO, io.BufferedReader(reader, _BUFFER_BYTES))


def read_limited(file: BinaryIO, limit: int) -> bytearray:
    """All that a file holds, or `limit` + 1 bytes of what holds more; nothing is held twice.

    Raises:
        OSError, EOFError, or an error of the compression: it can't be read.
    """
    data = bytearray()
    while len(data) <= limit and (piece := file.read(min(_BUFFER_BYTES, limit + 1 - len(data)))):
        data += piece
    return data


def read_line(file: BinaryIO, limit: int) -> bytes | bytearray:
    """The next line with its end, or `limit` + 1 bytes of a longer one; empty at the end of the file.

    Raises:
        OSError, EOFError, or an error of the compression: it can't be read.
    """
    size = min(_BUFFER_BYTES, limit + 1)
    line = file.readline(size)
    if len(line) < size or line.endswith(b"\n"):
        return line
    data = bytearray(line)
    while len(data) <= limit and (piece := file.readline(min(_BUFFER_BYTES, limit + 1 - len(data)))):
        data += piece
        if piece.endswith(b"\n"):
            break
    return data


def skip_line(file: BinaryIO) -> int | None:
    """Go on to the end of a line that was read in part; the bytes on the way, None if the end does not come."""
    skipped = 0
    while skipped < MAX_SKIP_BYTES:
        piece = file.readline(_BUFFER_BYTES)
        skipped += len(piece)
        if not piece or piece.endswith(b"\n"):
            return skipped
    return None


class _Frames(io.RawIOBase):
    """The frames of a zstd or xz file, one after the other.

    zstandard's own stream reads a truncated file as if it were whole, and lzma's has no limit of memory.

    Args:
        raw: the file.
        new_decoder: makes the decoder of a frame.
        padding: bytes that may follow a frame.
    """

    def __init__(self, raw: BinaryIO, new_decoder: Callable[[], Any], padding: bytes = b"") -> None:
        self._raw, self._new_decoder, self._padding = raw, new_decoder, padding
        self._decoder: Any = None
        self._input, self._used = memoryview(b""), 0
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if self._used == len(self._input) and not self._fill():
                return 0
            piece = self._input[self._used : self._used + _FEED_BYTES]
            self._used += len(piece)
            self._output = self._decode(piece)
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def _fill(self) -> bool:
        """Read on; whether there was more."""
        self._input, self._used = memoryview(self._raw.read(_BUFFER_BYTES)), 0
        if not self._input and self._decoder is not None:
            raise EOFError("the file ends within a compressed frame")
        return bool(self._input)

    def _decode(self, piece: memoryview) -> memoryview:
        data = bytes(piece)
        if self._decoder is None:
            if not (data := data.lstrip(self._padding)):
                return memoryview(b"")
            self._decoder = self._new_decoder()
        try:
            output = memoryview(self._decoder.decompress(data))
        except (zstandard.ZstdError, lzma.LZMAError) as error:
            if "too much memory" in str(error) or "Memory usage limit" in str(error):
                raise EOFError(f"it needs more than {WINDOW_BYTES / 2**30:.0f} GB of memory to expand") from error
            raise
        if self._decoder.eof:
            self._used -= len(self._decoder.unused_data)
            self._decoder = None
        return output


class _Bz2(io.RawIOBase):
    """The streams of a bzip2 file, one after the other.

    Python's own file takes whatever follows the first stream, if that is no stream, for the end: a flipped bit there
    would lose the rest of a file of many streams, as pbzip2 writes them, in silence.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder, self._has_begun = bz2.BZ2Decompressor(), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._decoder.eof:
                data = self._decoder.unused_data
                self._decoder, self._has_begun = bz2.BZ2Decompressor(), False
            if not data and self._decoder.needs_input and not (data := self._raw.read(_BUFFER_BYTES)):
                if self._has_begun:
                    raise EOFError("the file ends within a compressed stream")
                return 0
            self._has_begun = True
            if output := self._decoder.decompress(data, len(buffer)):
                buffer[: len(output)] = output
                return len(output)
