"""Compressed files are read whole and exactly, and what a few bytes expand to is never held at once."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_tools import codecs
from data_tools.codecs import decompress, read_limited, read_line, skip_line
from data_tools.documents import ReadOptions
from data_tools.problems import LeftOut
from data_tools.readers import documents
from infini_train.config.errors import ConfigError

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
MB = 1_000_000
BOMB_MB = 100


@pytest.mark.parametrize("suffix", PACK)
def test_any_number_of_frames_of_any_size_is_read_exactly(suffix) -> None:
    frames = [b"", b"one", os.urandom(3000), b"a" * 3_000_000, bytes(range(256)) * 9000, *[b"x"] * 50]
    packed = io.BytesIO(b"".join(PACK[suffix](frame) for frame in frames))
    assert decompress(packed, f"a{suffix}").read() == b"".join(frames)


def test_padding_between_xz_streams_is_no_data() -> None:
    packed = io.BytesIO(lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4000))
    assert decompress(packed, "a.xz").read() == b"onetwo"


@pytest.mark.parametrize("suffix", PACK)
def test_every_cut_of_a_compressed_file_is_told(suffix) -> None:
    packed = PACK[suffix](b"some text that is cut" * 5)
    for stop in range(1, len(packed)):
        with pytest.raises(codecs.READ_ERRORS):
            decompress(io.BytesIO(packed[:stop]), f"a{suffix}").read()


def bomb(suffix: str, unit: bytes) -> bytes:
    """What expands to 150 MB of a unit."""
    pieces = [unit * (MB // len(unit)) for _ in range(BOMB_MB)]
    if suffix == ".zst":
        pack = zstandard.ZstdCompressor(level=3).compressobj()
    elif suffix == ".gz":
        return gzip.compress(pieces[0], 1) * BOMB_MB
    else:
        return PACK[suffix](b"".join(pieces[:50])) * (BOMB_MB // 50)
    return b"".join([pack.compress(piece) for piece in pieces]) + pack.flush()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    for suffix in PACK:
        (folder / f"b{suffix}").write_bytes(bomb(suffix, b"a"))
    return folder


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("skip", ["error", "skip"])
def test_a_record_that_expands_beyond_the_limit_is_refused_in_little_memory(bombs, suffix, kind, skip) -> None:
    path = bombs / f"b{suffix}"
    assert path.stat().st_size < 2 * MB
    options, left_out = ReadOptions(format=kind, max_record_bytes=3 * MB), LeftOut(on_bad_record=skip)
    tracemalloc.start()
    try:
        if skip == "error":
            with pytest.raises(ConfigError, match=rf"b{suffix}(:1)?: has more than 3 MB; cut it, or raise"):
                list(documents([str(path)], options, left_out))
        else:
            with pytest.raises(ConfigError, match="no documents found"):
                list(documents([str(path)], options, left_out))
            assert left_out.documents == {"bad records": 1}
        assert tracemalloc.get_traced_memory()[1] < 60 * MB
    finally:
        tracemalloc.stop()


def test_zstd_of_a_long_window_is_read(tmp_path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    pack = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(pack.compress(b'{"text": "one"}\n') + pack.flush())
    assert [document.text for document in documents([str(tmp_path / "a.jsonl.zst")])] == ["one"]


@pytest.mark.parametrize("suffix", [".zst", ".xz"])
def test_more_memory_than_the_stated_bound_is_refused(tmp_path, monkeypatch, suffix) -> None:
    monkeypatch.setattr(codecs, "WINDOW_BYTES", 1 << 20)
    if suffix == ".zst":
        packed = struct.pack("<I", zstandard.MAGIC_NUMBER) + bytes([0, 0x60]) + b"\x01\x00\x00"
    else:
        packed = lzma.compress(b"text", preset=6)  # a dictionary of 8 MB
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    with pytest.raises(ConfigError, match=rf"a.txt{suffix}: can't be read on: it needs more than 0 GB of memory"):
        list(documents([str(tmp_path / f"a.txt{suffix}")]))


@pytest.mark.parametrize("limit", [1, 4, 5, 6, 2_000_000])
def test_lines_are_cut_at_the_limit(limit) -> None:
    lines = [b"abcde\n", b"x" * 3_000_000 + b"\n", b"\n", b"last"]
    file = io.BytesIO(b"".join(lines))
    for line in lines:
        found = read_line(file, limit)
        assert found == line[: limit + 1]
        if not found.endswith(b"\n"):
            skip_line(file)
    assert read_line(file, limit) == b""
    assert read_limited(io.BytesIO(b"abcde"), limit) == b"abcde"[: limit + 1]


def test_a_line_without_an_end_is_not_skipped_for_ever(bombs, monkeypatch) -> None:
    for module in ("codecs", "readers"):
        monkeypatch.setattr(f"data_tools.{module}.MAX_SKIP_BYTES", 10 * MB)
    options, left_out = ReadOptions(format="jsonl", max_record_bytes=3 * MB), LeftOut(on_bad_record="skip")
    with pytest.raises(ConfigError, match="no documents found"):
        list(documents([str(bombs / "b.zst")], options, left_out))
    assert [place.partition(": ")[2] for place in left_out.places] == [
        "has more than 3 MB",
        "goes on for 10 MB more; the rest of the file is left out",
    ]
