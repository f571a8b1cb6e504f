"""Records of any content: the right documents or one line that names the place, and nothing else."""

import io
import json
import math
import struct
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import cli, parquet
from data_tools.clean import CleanOptions, clean_corpus
from data_tools.documents import ReadOptions
from data_tools.encode import EncodeOptions, encode_corpus
from data_tools.inspect import show_document
from data_tools.problems import LeftOut
from data_tools.readers import documents
from data_tools.verify import verify
from infini_train.config.errors import ConfigError
from infini_train.data.shard_file import encode_metadata
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer

GOOD = b'{"text": "good"}\n'
FEW_SECONDS = settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read(path: Path, **options) -> tuple[list, LeftOut]:
    """The documents under skip; and whatever is wrong under error is one line."""
    left_out = LeftOut(on_bad_record="skip")
    try:
        found = list(documents([path], ReadOptions(**options), left_out))
    except ConfigError as error:
        assert str(error).isprintable()
        found = []
    assert all(place.isprintable() for place in left_out.places)
    if left_out.documents["bad records"]:
        with pytest.raises(ConfigError) as stopped:
            list(documents([path], ReadOptions(**options)))
        assert str(stopped.value).isprintable()
    return found, left_out


def strict(text: str | bytes):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


# ---------------------------------------------------------------------------------------------------------- JSON lines


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b'{"text": "a", "title": ' + b"[" * 501 + b"]" * 501 + b"}", "nested more than 500 deep"),
        (b'{"text": "a", "title": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "nested more than 500 deep"),
        (b'{"text": "a", "id": ' + b"[" * 950 + b"]" * 950 + b"}", "nested more than 500 deep"),
        (b'{"text": "a", "title": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b'{"text": NaN}', "field 'text' holds float, not text"),
        (b'{"text": {"a": 1}}', "field 'text' holds dict, not text"),
        (b'{"text": "\\udfff"}', "half a surrogate pair"),
        (b'{"a\\nb\\u001b[2J": 1, "\\ud800": 2}', r"the fields here are: a\nb\x1b[2J, \ud800"),
        (b'{"' + b"k" * 100_000 + b'": 1}', "the fields here are: " + "k" * 60 + "..."),
        (b"{" + b",".join(b'"k%d": 1' % i for i in range(9000)) + b"}", ", k19 and 8,980 more"),
    ],
)
def test_a_bad_record_is_one_line_and_the_next_one_is_read(tmp_path, record, problem) -> None:
    (tmp_path / "a.jsonl").write_bytes(record + b"\n" + GOOD)
    found, left_out = read(tmp_path / "a.jsonl")
    assert [document.text for document in found] == ["good"] and left_out.documents == {"bad records": 1}
    assert "a.jsonl:1: " in left_out.places[0] and problem in left_out.places[0] and len(left_out.places[0]) < 2000


def test_whether_a_record_is_too_deep_does_not_depend_on_who_reads_it(tmp_path) -> None:
    """Deduplication reads twice and counts documents: a verdict by the free stack would number them differently."""
    depth = 499
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "title": ' + b"[" * depth + b"]" * depth + b"}\n" + GOOD)

    def at(frames: int) -> int:
        return at(frames - 1) if frames else len(read(tmp_path / "a.jsonl")[0])

    assert [at(0), at(100), at(200)] == [2, 2, 2]


@FEW_SECONDS
@given(
    data=st.binary(max_size=60)
    | st.lists(
        st.sampled_from([b'{"text": ', b'"a', b'"', b"}", b"\n", b"[", b"\\ud800", b"\xff", b"NaN", b"1e999"])
    ).map(b"".join)
)
def test_any_bytes_are_json_lines_or_told(tmp_path, data) -> None:
    (tmp_path / "a.jsonl").write_bytes(data + b"\n" + GOOD)
    found, _ = read(tmp_path / "a.jsonl")
    assert found[-1].text == "good"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(FEW_SECONDS, max_examples=12)
@given(
    rows=st.lists(st.fixed_dictionaries({"text": JSON | st.text(), "id": JSON, "title": JSON, "n": JSON}), max_size=5)
)
def test_what_is_kept_of_any_row_is_strict_json(tmp_path_factory, rows) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "good"}]))
    reading = ReadOptions(keep_fields=("title", "n"))
    good = sum(isinstance(row["text"], str) and row["text"] not in ("", "\ud800") for row in rows) + 1
    report = clean_corpus([folder / "a.jsonl"], folder / "clean", CleanOptions(read=reading, on_bad_record="skip"))
    assert report.documents == good
    strict((folder / "clean" / "report.json").read_bytes())
    options = EncodeOptions(read=reading)
    manifests, _ = encode_corpus([folder / "clean"], "byte", folder / "set", options)
    assert manifests[folder / "set"].documents == good and verify(folder / "set") == []
    strict((folder / "set" / "manifest.json").read_bytes())
    for number in range(good):
        strict(show_document(folder / "set", number).split("\n\n")[0])


def test_numbers_that_json_cannot_spell_become_text(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "x": NaN, "y": Infinity, "z": -1e999, "w": 2.5}\n')
    assert cli.main(["encode", f"{tmp_path}/a.jsonl", "--tokenizer", "byte", "--out", f"{tmp_path}/set"]) == 0
    reading = EncodeOptions(read=ReadOptions(keep_fields=("x", "y", "z", "w")), overwrite=True)
    encode_corpus([tmp_path / "a.jsonl"], "byte", tmp_path / "set", reading)
    metadata = Dataset.open(tmp_path / "set").metadata(0)
    assert {name: metadata[name] for name in "xyzw"} == {"x": "NaN", "y": "Infinity", "z": "-Infinity", "w": 2.5}


def test_datasets_that_hold_nan_are_still_read_and_become_strict_when_split(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("infini_train.data.shard_file.strict_json", lambda value: value)  # as it was
        with ShardWriter(tmp_path / "old", ByteTokenizer()) as writer:
            for name in "ab":
                writer.add(np.arange(5), n_bytes=5, id=name, metadata={"x": math.nan})
    assert verify(tmp_path / "old") == [] and math.isnan(Dataset.open(tmp_path / "old").metadata(0)["x"])
    assert strict(show_document(tmp_path / "old", 0).split("\n\n")[0])["x"] == "NaN"
    assert cli.main(["split", f"{tmp_path}/old", "--out", f"{tmp_path}/new", "--holdout", "0.5"]) == 0
    for name in ("train", "validation"):
        assert strict(encode_metadata(Dataset.open(tmp_path / "new" / name).metadata(0)))["x"] == "NaN"


def test_a_field_that_encode_itself_writes_is_not_taken_from_the_corpus(tmp_path, capsys) -> None:
    """A document would be taken for a pair of book and summary."""
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefgh", "loss_start": 5}\n')
    arguments = ["encode", f"{tmp_path}/a.jsonl", "--tokenizer", "byte", "--out", f"{tmp_path}/set"]
    assert cli.main([*arguments, "--keep-field", "loss_start"]) == 2
    assert "error: --keep-field: loss_start is where encode notes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- Parquet


def write_table(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_null_text_is_an_empty_document(tmp_path) -> None:
    found, left_out = read(write_table(tmp_path / "a.parquet", text=["one", None, "three"], title=[None, "b", "c"]))
    assert [(d.id, d.text, d.metadata) for d in found] == [
        ("a.parquet:1", "one", {}),
        ("a.parquet:3", "three", {"title": "c"}),
    ]
    assert left_out.documents == {"empty documents": 1}
    found, left_out = read(tmp_path / "a.parquet", text_field="title", summary_field="text")
    assert [(d.text, d.summary) for d in found] == [("c", "three")] and left_out.documents["bad records"] == 1


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([b"one", "zw\u00f6lf".encode()], pyarrow.binary()),
        pyarrow.array(["one", "zw\u00f6lf"]).dictionary_encode(),
        pyarrow.array(["one", "zw\u00f6lf"], pyarrow.large_string()),
        pyarrow.array(["one", "zw\u00f6lf"], pyarrow.string_view()),
    ],
    ids=["binary", "dictionary", "large", "view"],
)
def test_text_of_every_type_is_text(tmp_path, column) -> None:
    for name in ("text", "a.b"):
        path = write_table(tmp_path / "a.parquet", **{name: column, "a": [{"b": 1}, {"b": 2}]})
        assert [document.text for document in read(path, text_field=name)[0]] == ["one", "zw\u00f6lf"]


@pytest.mark.parametrize(
    ("columns", "place"),
    [
        ({"text": [{"a": "x"}]}, "row 1: field 'text' holds dict, not text"),
        ({"text": [["x"]]}, "row 1: field 'text' holds list, not text"),
        ({"text": [b"\xff"]}, "row 1: field 'text' is not valid UTF-8"),
        ({"text": ["a"], "title": pyarrow.array([2**30], pyarrow.date32())}, "row 1: field 'title' can't be read: "),
        ({"text": ["a"], "title": pyarrow.array([2**62], pyarrow.duration("s"))}, "row 1: field 'title' can't be read"),
        ({"body": ["a"]}, "a.parquet: no field 'text'; the fields here are: body"),
        ({"text": ["x" * 3_000_000]}, "row 1: has more than 1 MB"),
        ({"text": ["\u20ac" * 400_000]}, "row 1: has more than 1 MB"),
    ],
)
def test_rows_that_cannot_be_documents_are_named(tmp_path, columns, place) -> None:
    found, left_out = read(write_table(tmp_path / "a.parquet", **columns), max_record_bytes=1_000_000)
    assert not found and left_out.documents == {"bad records": 1} and place in left_out.places[0]


def test_dates_and_binary_ids_stay_what_they_were(tmp_path) -> None:
    path = write_table(tmp_path / "a.parquet", text=["a"], id=[b"\xff\x00"], title=[date(2026, 1, 2)])
    assert [(d.id, d.metadata) for d in read(path)[0]] == [("b'\\xff\\x00'", {"title": "2026-01-02"})]


def test_two_columns_of_one_name_and_a_later_file_without_the_column_are_told(tmp_path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    write_table(tmp_path / "a.parquet", text=["good"])
    write_table(tmp_path / "b.parquet", body=["a"])
    found, left_out = read(tmp_path)
    assert [document.text for document in found] == ["good"] and left_out.documents == {"bad records": 2}
    assert "b.parquet: no field 'text'" in left_out.places[0] and "c.parquet: has two columns" in left_out.places[1]


def test_a_text_stored_once_and_repeated_in_every_row_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch) -> None:
    path = write_table(tmp_path / "a.parquet", text=pyarrow.array(["x" * 100_000] * 300).dictionary_encode())
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 1_000_000)
    sizes = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def watched(*arguments, **more):
        for batch in real(*arguments, **more):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    assert len(read(path)[0]) == 300 and max(sizes) <= 10


def whole_parquet() -> bytes:
    out = io.BytesIO()
    rows = pyarrow.table(
        {"text": ["some text", None, "more"] * 9, "id": list("abc") * 9, "title": [1.5, math.nan, 2.5] * 9}
    )
    pyarrow.parquet.write_table(rows, out, row_group_size=10)
    return out.getvalue()


WHOLE_PARQUET = whole_parquet()


def damage(whole: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some changed, taken out, put in, or cut off."""
    place = st.integers(0, len(whole) - 1)
    change = st.tuples(place, st.integers(0, 9), st.binary(max_size=9))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        data = whole
        for start, length, new in changes:
            data = data[:start] + new + data[start + length :]
        return data

    return st.lists(change, min_size=1, max_size=4).map(apply) | place.map(lambda end: whole[:end])


@FEW_SECONDS
@given(data=damage(WHOLE_PARQUET) | st.binary(max_size=40))
def test_any_bytes_are_parquet_or_told(tmp_path, data) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    read(tmp_path / "a.parquet")


# ------------------------------------------------------------------------------------------------------ Megatron's ids


def write_index(path: Path, lengths: list[int], starts: list[int], bounds: list[int], version: int = 1) -> Path:
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, 8, len(lengths), len(bounds))
    path.with_suffix(".bin").write_bytes(np.arange(10, dtype="<u2").tobytes())
    parts = (np.array(lengths, "<i4"), np.array(starts, "<i8"), np.array(bounds, "<i8"))
    path.with_suffix(".idx").write_bytes(head + b"".join(part.tobytes() for part in parts))
    return path.with_suffix(".bin")


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (([-1, 3], [0, 4], [0, 1, 2]), "a.idx: is not a whole index of Megatron's: negative lengths or places"),
        (([2, 3], [-4, 4], [0, 1, 2]), "negative lengths or places"),
        (([2, 3], [0, 4], [0, 2, 1, 2]), "its documents don't fit its sequences"),
        (([2, 3], [0, 4], [0, -(2**63), 2]), "its documents don't fit its sequences"),
        (([2, 3], [0, 4], []), "its documents don't fit its sequences"),
        (([2, 3], [0, 4], [0, 1, 2], 2), "version 2 of the format, not 1"),
    ],
)
def test_an_index_that_cannot_be_is_told(tmp_path, index, problem) -> None:
    found, left_out = read(write_index(tmp_path / "a", *index))
    assert not found and left_out.documents == {"bad records": 1} and problem in left_out.places[0]


def test_documents_that_lie_outside_of_the_ids_are_told_and_the_others_are_read(tmp_path) -> None:
    path = write_index(tmp_path / "a", [2, 3, 2**31 - 1, 1], [0, 2**63 - 2, 0, 18], [0, 1, 2, 3, 4])
    found, left_out = read(path)
    assert [(d.id, d.tokens.tolist()) for d in found] == [("a.bin:0", [0, 1]), ("a.bin:3", [9])]
    assert [place.split(": ", 1)[1] for place in left_out.places] == ["ends in document 1", "ends in document 2"]


def test_a_document_that_repeats_its_ids_stays_under_the_limit_of_a_record(tmp_path) -> None:
    """A small file could otherwise fill the memory."""
    path = write_index(tmp_path / "a", [10] * 1000, [0] * 1000, [0, 1000])
    found, left_out = read(path, max_record_bytes=1000)
    assert not found and "document 0: has more than 0 MB" in left_out.places[0]
    assert read(path)[0][0].tokens.size == 10_000


@FEW_SECONDS
@given(
    lengths=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 5), max_size=3),
    starts=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 20), min_size=3, max_size=3),
    bounds=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=4),
    cut=st.none() | st.integers(0, 80),
)
def test_any_index_is_read_or_told(tmp_path, lengths, starts, bounds, cut) -> None:
    path = write_index(tmp_path / "a", lengths, starts[: len(lengths)], bounds)
    path.with_suffix(".idx").write_bytes(path.with_suffix(".idx").read_bytes()[:cut])
    found, left_out = read(path)
    for document in found:
        assert document.tokens.tolist() == sorted(document.tokens.tolist()) or len(document.tokens) > 3
    assert left_out.documents["bad records"] or len(found) + left_out.documents["empty documents"] == max(
        len(bounds) - 1, 0
    )
