"""Tars and Megatron's token files: every document, nothing unpacked, damage named by file and record."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_tools.documents import ReadOptions
from data_tools.encode import EncodeOptions, encode_corpus
from data_tools.problems import LeftOut
from data_tools.readers import documents, texts
from data_tools.verify import verify
from infini_train.config.errors import ConfigError
from infini_train.data.shards import Dataset
from infini_train.data.tokenizer import ByteTokenizer

TEXTS = [f"Über {i}\n" * (1 + i % 5) for i in range(30)]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_megatron(stem: Path, texts: list[str], end: list[int] = [257]) -> Path:  # noqa: B006
    ids = [[*text.encode(), *end] for text in texts]
    np.array([i for document in ids for i in document], "<u2").tofile(stem.with_suffix(".bin"))
    lengths = np.array([len(document) for document in ids], "<i4")
    starts = np.concatenate([[0], 2 * np.cumsum(lengths)[:-1]]).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(ids), len(ids) + 1)
    bounds = np.arange(len(ids) + 1, dtype="<i8")
    stem.with_suffix(".idx").write_bytes(head + lengths.tobytes() + starts.tobytes() + bounds.tobytes())
    return stem.with_suffix(".bin")


def texts_of(folder: Path) -> list[str]:
    dataset = Dataset.open(folder)
    return [ByteTokenizer().decode(dataset.read(i, 0, int(n))) for i, n in enumerate(dataset.lengths_tokens)]


@pytest.mark.parametrize("kind", ["txt", "json", "both"])
def test_webdataset_samples_are_documents(tmp_path, kind) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, text in enumerate(TEXTS):
            row = {"text": text, "title": f"T{i}", "id": f"k{i}"} if kind == "json" else {"title": f"T{i}"}
            parts = {"txt": {"txt": text}, "json": {"json": row}, "both": {"json": row, "txt": text, "png": b"\x89"}}
            writer.write({"__key__": f"x/{i:03d}", **parts[kind]})
    found = list(documents([tmp_path / "a.tar"]))
    assert [d.text for d in found] == TEXTS
    assert [d.id for d in found][:2] == (["k0", "k1"] if kind == "json" else ["a.tar:x/000", "a.tar:x/001"])
    assert found[3].metadata == ({} if kind == "txt" else {"title": "T3"})
    data = (tmp_path / "a.tar").read_bytes()
    for name in ("b.tar.gz", "b.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(data))
        assert [d.text for d in documents([tmp_path / name])] == TEXTS


def test_our_own_shards_are_sources_of_token_ids(tmp_path) -> None:
    rows = [{"id": f"k{i}", "title": f"T{i}", "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode_corpus([str(tmp_path / "a.jsonl")], "byte", tmp_path / "set")
    encode_corpus([str(tmp_path / "set" / "shard-00000.tar")], "byte", tmp_path / "again")
    assert texts_of(tmp_path / "again") == TEXTS and verify(tmp_path / "again") == []
    first, again = (Dataset.open(tmp_path / name).metadata(7) for name in ("set", "again"))
    for metadata in (first, again):  # the name of the source differs, and with it the checksum
        del metadata["source"], metadata["crc32"]
    assert first == again


@pytest.mark.parametrize("kind", ["npy", "npy and json", "json"])
def test_tars_of_token_ids_are_encoded_as_they_are(tmp_path, kind) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, text in enumerate(TEXTS):
            ids = [*text.encode(), 257]  # 257: the end of text
            parts = {"json": {"json": ids}, "npy": {"npy": np.array(ids, ("<u2", "<i8", ">u4")[i % 3])}}
            parts["npy and json"] = {**parts["npy"], "json": {"title": f"T{i}", "id": f"k{i}"}}
            writer.write({"__key__": f"x/{i:03d}", **parts[kind]})
    encode_corpus([str(tmp_path / "a.tar")], "byte", tmp_path / "set")
    assert texts_of(tmp_path / "set") == TEXTS and verify(tmp_path / "set") == []
    metadata = Dataset.open(tmp_path / "set").metadata(3)
    assert metadata["id"] == ("k3" if kind == "npy and json" else "a.tar:x/003")
    assert metadata.get("title") == ("T3" if kind == "npy and json" else None)


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


class Bomb:
    """Unpickled, it would leave a file."""

    def __reduce__(self):
        return Path("exploded").touch, ()


def test_what_holds_no_token_ids_is_named_and_nothing_is_unpickled(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = npy(np.arange(9))
    huge = whole.replace(b"(9,)", b"(9" + b"0" * 12 + b",)")[: len(whole)]
    bad = {
        "0.npy": npy(np.array([Bomb()], object), allow_pickle=True),
        "1.pyd": b"pickled",
        "2.npy": whole[:-1],
        "3.npy": huge,
        "4.npy": npy(np.ones(3)),
        "5.npy": npy(np.ones((2, 2), int)),
        "6.npy": b"no array",
        "7.json": json.dumps([2**70]).encode(),
        "8.json": json.dumps([1, 2.5]).encode(),
    }
    path = write_tar(tmp_path / "a.tar", [*bad.items(), ("9.npy", whole)])
    left_out = LeftOut(on_bad_record="skip", max_bad_records=9)
    (found,) = documents([str(path)], left_out=left_out)
    assert found.tokens is not None and found.tokens.tolist() == list(range(9))
    assert left_out.documents == {"bad records": 9} and not Path("exploded").exists()
    assert "a.tar: 0: the .npy member holds no token ids: an array (1,) of object" in left_out.places[0]
    assert left_out.places[1].endswith("1: has no .txt, .json or .npy member but pyd")
    with pytest.raises(ConfigError, match=r"holds id -1, outside of the tokenizer's vocabulary of 259"):
        encode_corpus([str(write_tar(tmp_path / "b.tar", [("0.json", b"[-1]")]))], "byte", tmp_path / "set")


def test_names_are_read_as_webdataset_reads_them(tmp_path) -> None:
    """Lower-case extensions, no members of webdataset's own, and no second member of one name."""
    members = [("__meta__", b"x"), ("a.b/c.TXT", b"one"), ("d.txt", b"two"), ("__x__/e.txt", b"three")]
    path = write_tar(tmp_path / "a.tar", members)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    found = list(documents([path]))
    assert [(d.id.partition(":")[2], d.text.encode()) for d in found] == [(s["__key__"], s["txt"]) for s in theirs]
    assert [d.text for d in found] == ["one", "two"]
    left_out = LeftOut()
    assert len(list(documents([path], left_out=left_out))) == 2
    assert left_out.documents == {"members below __...__, which webdataset skips": 1}
    path = write_tar(tmp_path / "b.tar", [("a.txt", b"one"), ("a.txt", b"two")])
    with pytest.raises(ConfigError, match="b.tar: a: two members .txt follow each other; name each sample differently"):
        list(documents([path]))
    with pytest.raises(ValueError, match="duplicate file name"):
        list(webdataset.WebDataset(str(path), shardshuffle=False))


def test_tars_that_lead_elsewhere_are_told_and_left_out(tmp_path) -> None:
    good = ("a.txt", b"good")
    path = write_tar(tmp_path / "a.tar", [("../evil.txt", b"x"), ("/etc/evil.txt", b"x"), good, ("b.png", b"x")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    left_out = LeftOut(on_bad_record="skip")
    assert [d.text for d in documents([path], left_out=left_out)] == ["good"]
    assert [place.partition(": ")[2] for place in left_out.places] == [
        "'../evil.txt': leads out of the archive",
        "'/etc/evil.txt': leads out of the archive",
        "'link.txt': is a link or device, not a file",
        "b: has no .txt, .json or .npy member but png",
    ]
    with pytest.raises(ConfigError, match=r"a.tar: '../evil.txt': leads out of the archive; remove it, or pass"):
        list(documents([path]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("stop", [0, 700, 1024 + 512 * 3, -10240])
def test_cut_tars_are_told(tmp_path, stop) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.txt", text.encode() * 100) for i, text in enumerate(TEXTS)])
    path.write_bytes(path.read_bytes()[:stop])
    with pytest.raises(ConfigError, match=r"a.tar: is not a whole tar file|a.tar: can't be read on"):
        list(documents([path]))
    left_out = LeftOut(on_bad_record="skip")
    (tmp_path / "b.txt").write_text("good")
    found = [d.text for d in documents([path, tmp_path / "b.txt"], left_out=left_out)]
    assert found[-1] == "good" and found[:-1] == [text * 100 for text in TEXTS][: len(found) - 1]
    assert left_out.documents == {"bad records": 1}


def test_megatron_ids_are_taken_as_they_are(tmp_path) -> None:
    path = write_megatron(tmp_path / "a", [*TEXTS, ""])
    manifest = encode_corpus([str(path)], "byte", tmp_path / "set")[0][tmp_path / "set"]
    assert texts_of(tmp_path / "set") == TEXTS and verify(tmp_path / "set") == []
    assert manifest.bytes == sum(len(text.encode()) for text in TEXTS) == manifest.tokens
    assert manifest.left_out == {"empty documents": 1}
    assert Dataset.open(tmp_path / "set").metadata(7)["id"] == "a.bin:7"


def test_megatron_files_of_another_tokenizer_or_cut_are_told(tmp_path) -> None:
    with pytest.raises(ConfigError, match="a.bin:0: holds id 300, outside of the tokenizer's vocabulary of 259"):
        encode_corpus([str(write_megatron(tmp_path / "a", TEXTS, [300]))], "byte", tmp_path / "set")
    path = write_megatron(tmp_path / "b", TEXTS)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"b.bin: ends in document 29"):
        encode_corpus([str(path)], "byte", tmp_path / "set")
    skip = EncodeOptions(on_bad_record="skip")
    _, left_out = encode_corpus([str(path)], "byte", tmp_path / "set", skip)
    assert texts_of(tmp_path / "set") == TEXTS[:-1] and left_out.documents["bad records"] == 1
    for size in (0, 20, 60):
        index = path.with_suffix(".idx")
        index.write_bytes(index.read_bytes()[:size])
        with pytest.raises(ConfigError, match=r"b.idx: is not a whole index of Megatron's"):
            encode_corpus([str(path)], "byte", tmp_path / "other")
        write_megatron(tmp_path / "b", TEXTS)
    path.with_suffix(".idx").unlink()
    with pytest.raises(ConfigError, match=r"b.bin: can't be read on: No such file"):
        encode_corpus([str(path)], "byte", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"holds token ids, not text"):
        list(texts([write_megatron(tmp_path / "c", TEXTS)]))


def test_json_members_that_are_bad_are_named(tmp_path) -> None:
    rows = [b"{", json.dumps([1.5]).encode(), b'{"body": "x"}', b"\xff", b'{"text": 1}', b'{"text": "fine"}']
    path = write_tar(tmp_path / "a.tar", [(f"{i}.json", row) for i, row in enumerate(rows)])
    left_out = LeftOut(on_bad_record="skip")
    assert [d.text for d in documents([path], left_out=left_out)] == ["fine"]
    assert [place.split(": ", 2)[1] for place in left_out.places] == ["0", "1", "2", "3:1", "4"]


@pytest.mark.parametrize("damage", ["bad header", "cut in a header", "cut before a header", "no mark of the end"])
def test_a_tar_that_only_seems_to_end_is_told(tmp_path, damage) -> None:
    """To tarfile a header that can't be read is the end of the archive."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(10):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"hello"))
    data, header = bytearray(path.read_bytes()), 6 * 1024
    if damage == "bad header":
        data[header : header + 100] = b"\xff" * 100
    else:
        stops = {"cut in a header": header + 100, "cut before a header": header, "no mark of the end": 10 * 1024}
        del data[stops[damage] :]
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"x.tar: is not a whole tar file: "):
        list(documents([str(path)]))
    left_out = LeftOut(on_bad_record="skip")
    assert len(list(documents([str(path)], None, left_out))) == (10 if damage == "no mark of the end" else 6)
    assert left_out.documents["bad records"] == 1


# ------------------------------------------------------------------------------------------------- hostile headers


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header of a tar, whatever follows it."""
    data = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    data[124:136], data[148:156], data[156:157] = tarfile.itn(size, 12, tarfile.GNU_FORMAT), b" " * 8, kind
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


GOOD = header("good.txt", 4) + b"good".ljust(512, b"\0")
OTHER = header("__other__", 0)
END = bytes(1024)


def pax(*records: tuple[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A header of further properties, with what follows it."""
    body = b""
    for key, value in records:
        rest = f" {key}={value}\n".encode()
        size = len(rest) + 1
        while len(str(size)) + len(rest) != size:
            size = len(str(size)) + len(rest)
        body += str(size).encode() + rest
    return header("pax", len(body), kind) + body + bytes(-len(body) % 512)


HOSTILE = {
    **{f"claims {size}": (header("big.txt", size) + b"x" * 2000, "") for size in (10**8, 2**33, 2**40, 2**62)},
    "claims a negative size": (header("big.txt", -512) + GOOD + END, "claims -512 bytes"),
    "claims it in pax": (pax(("size", "-512")) + GOOD + END, "claims -512 bytes"),
    **{
        f"header of 2 MB, type {kind!r}": (header("long", 2 << 20, kind) + b"x" * (2 << 20) + GOOD + END, "a header of")
        for kind in (b"L", b"K", b"x", b"g", b"X")
    },
    "old sparse file": (header("s.txt", 0, tarfile.GNUTYPE_SPARSE) + GOOD + END, "sparse"),
    "sparse file 0.0": (pax(("GNU.sparse.size", "9"), ("GNU.sparse.numblocks", "1")) + GOOD + END, "sparse"),
    "sparse file 0.1": (pax(("GNU.sparse.map", "0,1"), ("GNU.sparse.size", "9")) + GOOD + END, "sparse"),
    "sparse file 1.0": (pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")) + GOOD + END, "sparse"),
    "a chain of headers": (pax(("comment", "x")) * 3000 + GOOD + END, ""),
    "many global headers": (
        b"".join(pax((f"key{i}", "x" * 60_000), kind=tarfile.XGLTYPE) + OTHER for i in range(20)) + END,
        "global headers of more than",
    ),
    "numbers that are none": (header("pax", 100, tarfile.XHDTYPE) + b"7777777 size=".ljust(512) + GOOD + END, ""),
}


@pytest.mark.parametrize("skip", ["error", "skip"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_end_in_a_line_about_the_archive(tmp_path, name, skip) -> None:
    data, message = HOSTILE[name]
    for path, packed in ((tmp_path / "a.tar", data), (tmp_path / "b.tar.gz", gzip.compress(data))):
        path.write_bytes(packed)
        if skip == "error":
            with pytest.raises(ConfigError, match=rf"{path.name}: (is not a whole tar file: |'big.txt': )"):
                list(documents([str(path)]))
            continue
        left_out = LeftOut(on_bad_record="skip")
        (tmp_path / "z.txt").write_text("last")
        found = [document.text for document in documents([str(path), str(tmp_path / "z.txt")], left_out=left_out)]
        assert set(found) <= {"good", "last"} and found[-1] == "last"
        assert left_out.documents["bad records"] >= 1 and message in "".join(left_out.places)


def test_a_sample_over_the_limit_is_refused_whatever_its_members(tmp_path) -> None:
    """Each of them may be under it; what is not read, such as pictures, does not count."""
    members = [("0.txt", b"x" * 700), ("0.json", b'{"title": "%s"}' % (b"y" * 700)), ("1.txt", b"fine")]
    path = write_tar(tmp_path / "a.tar", [*members, ("1.png", b"p" * 900)])
    options, left_out = ReadOptions(max_record_bytes=1000), LeftOut(on_bad_record="skip")
    assert [document.text for document in documents([str(path)], options, left_out)][-1] == "fine"
    assert left_out.places == [f"{path}: 0: has more than 0 MB"]
