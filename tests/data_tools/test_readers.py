"""Readers: every format gives the same documents; what can't be read is named with its place."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_tools.problems import LeftOut
from data_tools.readers import ReadOptions, documents
from infini_train.config import ConfigError

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
    assert [tuple(d) for d in documents([tmp_path / name], renamed)][7] == ("7", "T7", name, {"n": 7}, None)


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
    "a.jsonl:1: no field 'text'; the fields here are: body, url; choose with --text-field": b'{"body": "", "url": 1}',
    "a.jsonl:2: byte 10 is not valid UTF-8": b'{"text": "x"}\n{"text": "\xff"}\n',
    "a.jsonl:1: field 'text' holds NoneType, not text": b'{"text": null}\n',
    "a.jsonl:1: is not a JSON object": b"[1]\n",
    "a.jsonl:1: character 1 of the text is half a surrogate pair": b'{"text": "x\\ud800"}\n',
    "a.jsonl.gz: can't be read": b"no gzip",
    "a.jsonl.zst: can't be read": b"no zstd",
    "a.parquet: is not a readable Parquet file": b"no parquet",
    "a.zip: can't read this format; name it with --format": b"PK",
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


def test_missing_things_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="nothing: no such file or folder"):
        list(documents([tmp_path / "nothing"]))
    with pytest.raises(ConfigError, match="no documents found; a folder is searched for"):
        list(documents([tmp_path]))
    path = write(tmp_path, "a.parquet")
    with pytest.raises(
        ConfigError, match="no field 'key'; the fields here are: text, id, title, n; choose with --id-field"
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
