"""Readers: every format gives the same documents; what can't be read is named with its place."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import sys
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import readers
from data_tools.documents import FileRange, ReadOptions
from data_tools.encode import encode_corpus
from data_tools.problems import LeftOut
from data_tools.readers import Reader, documents
from infini_train.config.errors import ConfigError
from infini_train.data.shards import Dataset

ROWS = [{"text": f"Zeile {i}\n\tüber", "id": f"k{i}", "title": f"T{i}", "n": i} for i in range(600)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=100)
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(
            path.suffix, bytes
        )
        path.write_bytes(pack(LINES))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.jsonl.bz2", "a.parquet"])
def test_all_tables_give_the_same(tmp_path, name) -> None:
    found = list(documents([write(tmp_path, name)]))
    assert [(d.id, d.text, d.metadata) for d in found] == [(r["id"], r["text"], {"title": r["title"]}) for r in ROWS]
    assert {d.source for d in found} == {name}
    renamed = ReadOptions(text_field="title", id_field="n", keep_fields=("n", "none"))
    assert [tuple(d) for d in documents([tmp_path / name], renamed)][7] == ("7", "T7", name, {"n": 7}, None, None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_summary_is_read_beside_its_text(tmp_path, name) -> None:
    options = ReadOptions(summary_field="title", keep_fields=())
    found = list(documents([write(tmp_path, name)], options))
    assert [(d.text, d.summary) for d in found] == [(r["text"], r["title"]) for r in ROWS]
    with pytest.raises(ConfigError, match="no field 'abstract'; .*; choose with summary_field"):
        list(documents([tmp_path / name], ReadOptions(summary_field="abstract")))


def test_zstd_of_several_frames_is_read_whole(tmp_path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES) + zstandard.compress(LINES))
    assert len(list(documents([tmp_path / "a.jsonl.zst"]))) == 1200


def test_folders_are_read_in_order_without_hidden_files(tmp_path) -> None:
    root = tmp_path / "tree"
    for name in ("b.txt", "a/z.md", "a/c.py", "a/.git/x.md", ".hidden.txt", "c.dat", "d.rst", "empty.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"" if name == "empty.txt" else name.encode() + b"\r\n\t")
    write(root, "t.jsonl")
    left_out = LeftOut()
    found = list(documents([root, root / "c.dat"], left_out=left_out))
    ids = [d.id for d in found]
    assert ids[:4] == ["tree/b.txt", "tree/d.rst", "k0", "k1"] and ids[-3:] == ["tree/a/c.py", "tree/a/z.md", "c.dat"]
    assert (
        found[0].text == "b.txt\r\n\t" and left_out.documents == {"empty documents": 1} and found[-1].source == "c.dat"
    )


def test_rows_without_id_are_named_by_place(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y", "id": 5}\n')
    assert [d.id for d in documents([tmp_path / "a.jsonl"])] == ["a.jsonl@0", "5"]


BROKEN = {
    "a.txt:2: byte 4 is not valid UTF-8; re-encode it": b"abc\n\xff\xfe",
    "a.jsonl:2: is not valid JSON": b'{"text": "x"}\n{"text": \n',
    "a.jsonl:1: no field 'text'; the fields here are: body, url; choose with text_field": b'{"body": "", "url": 1}',
    "a.jsonl:2: byte 10 is not valid UTF-8": b'{"text": "x"}\n{"text": "\xff"}\n',
    "a.jsonl:1: field 'text' holds NoneType, not text": b'{"text": null}\n',
    "a.jsonl:1: is not a JSON object": b"[1]\n",
    "a.jsonl:1: character 1 of the text is half a surrogate pair": b'{"text": "x\\ud800"}\n',
    "a.jsonl.gz: can't be read": b"no gzip",
    "a.jsonl.zst: can't be read": b"no zstd",
    "a.parquet: is not a readable Parquet file": b"no parquet",
    "a.zip: can't read this format; name it with format": b"PK",
    "no documents found": b"",
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_broken_is_named_in_one_line(tmp_path, message) -> None:
    name = message.split(":")[0] if message.startswith("a.") else "a.txt"
    (tmp_path / name).write_bytes(BROKEN[message])
    with pytest.raises(ConfigError) as error:
        list(documents([tmp_path / name]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_cut_gzip_is_named(tmp_path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES)[:-100])
    with pytest.raises(ConfigError, match="a.jsonl.gz"):
        list(documents([tmp_path / "a.jsonl.gz"]))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_broken_compressed_files_are_told_and_the_rest_is_read(tmp_path, suffix, damage) -> None:
    path = write(tmp_path, f"a.jsonl{suffix}")
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] if damage == "cut" else data[:half] + bytes(99) + data[half + 99 :])
    (tmp_path / "b.txt").write_text("good")
    with pytest.raises(ConfigError, match=rf"a.jsonl{suffix}.*on_bad_record skip"):
        list(documents([path]))
    left_out = LeftOut(on_bad_record="skip", max_bad_records=10)
    found = list(documents([path, tmp_path / "b.txt"], left_out=left_out))
    assert found[-1].text == "good" and {d.text for d in found[:-1]} <= {row["text"] for row in ROWS}
    assert 1 <= left_out.documents["bad records"] <= 3  # the file, and the lines that the damage hit


def test_empty_files_are_no_documents(tmp_path) -> None:
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.jsonl.bz2"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "z.txt").write_text("good")
    left_out = LeftOut(on_bad_record="skip")
    assert [d.text for d in documents([tmp_path], left_out=left_out)] == ["good"]
    assert left_out.documents["empty documents"] == 1
    with pytest.raises(ConfigError, match="d.parquet: is not a readable Parquet file"):
        (tmp_path / "d.parquet").write_bytes(b"")
        list(documents([tmp_path / "d.parquet"]))


def test_records_over_the_limit_are_told(tmp_path) -> None:
    long, options = "x" * 3_000_000, ReadOptions(max_record_bytes=1_000_000)
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{long}"}}\n{{"text": "fine"}}\n')
    (tmp_path / "b.txt").write_text(long)
    left_out = LeftOut(on_bad_record="skip")
    assert [d.text for d in documents([tmp_path], options, left_out)] == ["fine"]
    assert [place.rpartition("/")[2] for place in left_out.places] == [
        "a.jsonl:1: has more than 1 MB",
        "b.txt: has more than 1 MB",
    ]
    with pytest.raises(ConfigError, match=r"a.jsonl:1: has more than 1 MB; cut it, or raise max_record_bytes"):
        list(documents([tmp_path], options))


def read_in_pieces(path: Path, bounds: list[int]) -> list[str]:
    reader = Reader(ReadOptions(), LeftOut())
    pieces = [FileRange(str(path), path.name, "s", a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return [document.id for piece in pieces for document in reader.documents(piece)]


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.text("aé", max_size=9), max_size=9), cuts=st.lists(st.integers(0, 999)), end=st.booleans())
def test_any_cut_of_json_lines_gives_each_record_once(tmp_path_factory, rows, cuts, end) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    lines = [json.dumps({"text": f"x{row}", "id": i}, ensure_ascii=False) for i, row in enumerate(rows)]
    path.write_text("\n\n".join(lines) + "\n" * end, encoding="utf-8")
    size = path.stat().st_size
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < size}), size]
    assert read_in_pieces(path, bounds) == ([str(i) for i in range(len(rows))] if size else [])


def test_any_cut_of_parquet_gives_each_row_once(tmp_path) -> None:
    path = write(tmp_path, "a.parquet")
    size = path.stat().st_size
    for step in (size, 1000, 777, 100):
        found = read_in_pieces(path, [*range(0, size, step), size])
        assert found == [row["id"] for row in ROWS]


def test_errors_in_a_piece_tell_the_line_of_the_file(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 9 + b"{\n")
    with pytest.raises(ConfigError, match="a.jsonl:10: is not valid JSON"):
        read_in_pieces(path, [60, path.stat().st_size])


def test_patterns_and_urls(tmp_path) -> None:
    for name in ("in/b.jsonl.gz", "in/a.jsonl", "in/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = b"deep" if name.endswith("txt") else f'{{"text": "{name}"}}'.encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    found = list(documents([f"{tmp_path}/in/*.jsonl*"]))
    assert [(d.id, d.source) for d in found] == [("in/a.jsonl@0", "in"), ("in/b.jsonl.gz@0", "in")]
    everything = [d.text for d in documents([f"{tmp_path}/in/**"])]
    assert everything == ["in/a.jsonl", "in/b.jsonl.gz", "deep"]
    system = fsspec.filesystem("memory")
    for name in ("in/b.jsonl.gz", "in/a.jsonl", "in/deep/c.txt"):
        system.pipe_file(f"/corpus/{name}", (tmp_path / name).read_bytes())
    for url in ("memory://corpus/in", "memory://corpus/in/**"):
        remote = list(documents([url]))
        assert [d.text for d in remote] == everything and remote[2].id == "in/deep/c.txt" and remote[0].source == "in"
    assert [d.text for d in documents(["memory://corpus/in/a.jsonl"])] == ["in/a.jsonl"]
    with pytest.raises(ConfigError, match="no file matches"):
        list(documents([f"{tmp_path}/*.nothing"]))
    with pytest.raises(ConfigError, match="memory://none: can't be found"):
        list(documents(["memory://none"]))
    with pytest.raises(ConfigError, match="nosuch://x: "):
        list(documents(["nosuch://x"]))


@pytest.mark.parametrize("kind", [None, "jsonl", "text"])
def test_standard_input(monkeypatch, kind) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    found = [d.text for d in documents(["-"], ReadOptions(format=kind))]
    assert found == ([LINES.decode()] if kind == "text" else [row["text"] for row in ROWS])


def test_missing_things_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="nothing: no such file or folder"):
        list(documents([tmp_path / "nothing"]))
    with pytest.raises(ConfigError, match="no documents found; a folder is searched for"):
        list(documents([tmp_path]))
    path = write(tmp_path, "a.parquet")
    with pytest.raises(
        ConfigError, match="no field 'key'; the fields here are: text, id, title, n; choose with id_field"
    ):
        list(documents([path], ReadOptions(id_field="key")))


def test_bad_text_can_be_skipped_and_is_counted(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b"good")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "fine"}\n{"text": "\\ud800"}\n')
    strings = pyarrow.array([b"\xff", b"row"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "d.parquet")
    left_out = LeftOut(on_bad_record="skip", max_bad_records=4)
    found = list(documents([tmp_path], left_out=left_out))
    assert [d.text for d in found] == ["good", "fine", "row"]
    assert left_out.documents == {"bad records": 4} and "a.txt:1" in left_out.places[0]
    with pytest.raises(ConfigError, match="more than 3 bad records, first: .*a.txt:1: byte 0"):
        list(documents([tmp_path], left_out=LeftOut(on_bad_record="skip", max_bad_records=3)))


def test_a_disk_or_network_that_fails_is_never_a_bad_record(tmp_path, monkeypatch) -> None:
    """Under --on-bad-record skip the rest of the file would be left out, though it is there."""

    class Broken(io.BytesIO):
        def readline(self, size=-1):
            if self.tell():
                raise ConnectionResetError(104, "Connection reset by peer")
            return super().readline(size)

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    monkeypatch.setattr(readers, "decompress", lambda raw, name: Broken(raw.read()))
    with pytest.raises(
        ConfigError, match=r"a.jsonl: can't be read on: Connection reset by peer; give the same command"
    ):
        list(documents([str(path)], None, LeftOut(on_bad_record="skip")))


ERRNOS = (errno.ESTALE, errno.EIO, errno.EFBIG, errno.ENAMETOOLONG, errno.EPERM, errno.ENOLINK, errno.EREMOTEIO)


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.tar", "a.jsonl.gz"])
def test_odd_errors_of_a_disk_end_in_a_line_with_the_file(tmp_path, monkeypatch, number, name) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            raise OSError(number, os.strerror(number))

    (tmp_path / name).write_bytes(b"{}")
    for module in ("readers", "tars"):
        monkeypatch.setattr(f"data_tools.{module}.open_raw", lambda path: io.BufferedReader(Broken()))
    with pytest.raises(ConfigError, match=rf"{name}: can't be read on: {os.strerror(number)}; give the same command"):
        list(documents([str(tmp_path / name)], None, LeftOut(on_bad_record="skip")))


def test_half_a_surrogate_pair_outside_of_the_text_does_no_harm(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": "x\\\\ud83d", "title": "y\\\\ud83d"}\n'.replace("\\\\", "\\"))
    encode_corpus([str(path)], "byte", tmp_path / "out")
    found = Dataset.open(tmp_path / "out").metadata(0)
    assert (found["id"], found["title"]) == ("x\ud83d", "y\ud83d")
