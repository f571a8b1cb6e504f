"""Formats by the names of files: any case, tars, JSON under other names, byte order marks, odd encodings."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

import pytest
import zstandard

from data_tools import cli
from data_tools.documents import ReadOptions
from data_tools.readers import documents
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import read_manifest

LINE = b'{"text": "hello hello hello"}\n'


def texts_in(*sources: Path | str, **options) -> list[str]:
    return [document.text for document in documents([str(source) for source in sources], ReadOptions(**options))]


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


# ------------------------------------------------------------------------------------------- files that change


def test_suffixes_are_read_in_any_case(tmp_path) -> None:
    import gzip

    import zstandard

    for number, (name, pack) in enumerate(
        {
            "D.JSONL": bytes,
            "E.Jsonl.GZ": gzip.compress,
            "F.NDJSON.Zst": zstandard.compress,
            "G.jsonl.zstd": zstandard.compress,
            "H.JSONL.XZ": lzma.compress,
            "I.jsonl.BZ2": bz2.compress,
        }.items()
    ):
        (tmp_path / name).write_bytes(pack(b'{"text": "one %d"}\n{"text": "two"}\n' % number))
    (tmp_path / "A.TXT").write_text("a book")
    (tmp_path / "B.Md").write_text("a page")
    lines = [text for number in range(6) for text in (f"one {number}", "two")]
    assert texts_in(tmp_path) == ["a book", "a page", *lines]
    assert texts_in(tmp_path / "E.Jsonl.GZ") == ["one 1", "two"]


PACKED = {
    "a.TAR": bytes,
    "a.Tar.Gz": gzip.compress,
    "a.TGZ": gzip.compress,
    "a.tzst": zstandard.compress,
    "a.txz": lzma.compress,
    "a.tbz2": bz2.compress,
}


def tar_of(name: str, text: bytes) -> bytes:
    data, member = io.BytesIO(), tarfile.TarInfo(name)
    member.size = len(text)
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(member, io.BytesIO(text))
    return data.getvalue()


@pytest.mark.parametrize("name", PACKED)
def test_tars_are_found_by_all_their_names(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(PACKED[name](tar_of("0.txt", b"hello")))
    assert texts_in(tmp_path) == ["hello"]


def test_a_tar_never_becomes_one_text(tmp_path) -> None:
    (tmp_path / "corpus.1").write_bytes(tar_of("0.txt", b"hello"))
    with pytest.raises(ConfigError, match=r"corpus.1: holds a tar, which its name does not say; .*format tar"):
        texts_in(tmp_path / "corpus.1")
    assert texts_in(tmp_path / "corpus.1", format="tar") == ["hello"]


@pytest.mark.parametrize("name", ["corpus.json", "corpus.JSON", "corpus.json.gz", "corpus.jsonlines"])
def test_json_lines_under_another_name_are_read_as_such(tmp_path, name) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINE * 3) if name.endswith("gz") else LINE * 3)
    assert texts_in(path) == ["hello hello hello"] * 3


@pytest.mark.parametrize("text", ['["a"]', '[\n {"text": "a"}\n]', '{\n "text": "a"\n}'])
def test_json_that_is_no_lines_is_refused(tmp_path, text) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=r"a.json:1: (is not valid JSON: .*jq -c|is not a JSON object)"):
        texts_in(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["corpus", "part-00000", "corpus.jsonl.1", "corpus.txt"])
@pytest.mark.parametrize("data", [LINE, LINE * 2, b"\xef\xbb\xbf" + LINE, b"\n" + LINE])
def test_json_lines_never_become_one_text(tmp_path, capsys, name, data) -> None:
    (tmp_path / name).write_bytes(data)
    arguments = ("encode", tmp_path / name, "--tokenizer", "byte", "--out", tmp_path / "set")
    assert call(*arguments) == 2
    assert f"{name}: holds JSON lines, which its name does not say; name its format (--format jsonl)" in (
        capsys.readouterr().err
    )
    assert texts_in(tmp_path / name, format="jsonl") == ["hello hello hello"] * data.count(LINE)
    assert texts_in(tmp_path / name, format="text") == [data.decode().removeprefix("\ufeff")]


def test_texts_that_only_look_like_json_lines_are_texts(tmp_path) -> None:
    found = ['{"text": 5}\n', '{"title": "x"}\n', "{ x }", '{"text": "a"}\nand so on', "ustar"]
    for number, text in enumerate(found):
        (tmp_path / f"{number}.txt").write_text(text)
    assert texts_in(tmp_path) == found


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.ZIP", "a.csv.gz", "a.feather", "a.lz4"])
def test_other_formats_are_not_read_as_text(tmp_path, name) -> None:
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(ConfigError, match="can't read this format; name it with format"):
        texts_in(tmp_path / name)
    if not name.endswith(".gz"):
        assert texts_in(tmp_path / name, format="text") == ["a,b\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "txt.tar", "json.tar"])
def test_a_byte_order_mark_is_dropped(tmp_path, name) -> None:
    mark, line = b"\xef\xbb\xbf", b'{"text": "one"}\n'
    data = mark + (b"one" if "txt" in name else line)
    if name.endswith("tar"):
        data = tar_of(f"0.{name.removesuffix('.tar')}", data)
    elif "jsonl" in name:
        data += mark + line + mark  # files that were put together
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts_in(tmp_path / name) == ["one"] * (2 if "jsonl" in name else 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_of_16_bits_is_refused_by_its_encoding(tmp_path, encoding, name) -> None:
    (tmp_path / name).write_bytes('{"text": "one"}\n{"text": "two"}\n'.encode(encoding))
    shown = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}.get(encoding, encoding.upper())
    with pytest.raises(ConfigError, match=rf"a\.\w+(:1)?: is {shown}, not UTF-8; re-encode it \(iconv -f {shown}"):
        texts_in(tmp_path / name)


def test_a_name_that_is_not_utf8_goes_through_every_command(tmp_path, capsys) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl"))
    path.write_bytes(b'{"text": "hello there"}\n' * 3)
    for source, name, out in ((path, "caf\\udce9.jsonl", "a"), (folder, "caf\\udce9", "b")):
        assert call("encode", source, "--tokenizer", "byte", "--out", tmp_path / out) == 0
        assert [each.name for each in read_manifest(tmp_path / out).sources] == [name]
        assert call("verify", tmp_path / out) == 0 and call("inspect", tmp_path / out, "--document", 0) == 0
        assert call("fertility", source, "--tokenizer", "byte") == 0
        assert call("clean", source, "--out", tmp_path / f"{out}-clean", "--dedup") == 0
        assert call("encode", tmp_path / f"{out}-clean", "--tokenizer", "byte", "--out", tmp_path / f"{out}2") == 0
    assert call("encode", path, tmp_path / "none.txt", "--tokenizer", "byte", "--out", tmp_path / "c") == 2
    assert call("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "ab") == 0
    assert capsys.readouterr().err.count("error: ") == 1


# ---------------------------------------------------------------------------------------------------- folders
