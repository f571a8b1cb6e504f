"""The index checks every field, even where its checksum is right."""

import hashlib
import json
from typing import Any

import pytest

from infini_train.checkpoint.fragments import CheckpointError
from infini_train.checkpoint.index import (
    FragmentEntry,
    Part,
    StoredFile,
    dump_index,
    dump_part,
    merge_parts,
    parse_index,
    parse_part,
)

FILE = StoredFile("rank-00000.safetensors", 100, "ab")


def entry(start: int, size: int) -> FragmentEntry:
    return FragmentEntry("w", "weight", "float32", (4,), (start,), (size,), 0, size, FILE.file, f"weight/w@{start}+0")


def test_parts_and_index_survive_json() -> None:
    part = Part("a", (FILE,), (entry(0, 2), entry(2, 2)))
    assert parse_part(dump_part(part)) == part
    index = merge_parts(7, [part], {"loss": 0.1, "rng": [1, None], "nested": {"a": True}}, {"name": "run"})
    assert parse_index(dump_index(index)) == index


def test_parts_that_nobody_could_read_back_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^w \(weight\): 2 of 4 elements are missing"):
        merge_parts(7, [Part("a", (FILE,), (entry(0, 2),))], {}, {})
    with pytest.raises(CheckpointError, match=r"^w \(weight\): stored twice, from element \[2\] on"):
        merge_parts(7, [Part("a", (FILE,), (entry(0, 3),)), Part("b", (FILE,), (entry(2, 2),))], {}, {})


@pytest.mark.parametrize(
    ("field", "value"), [("step", "7"), ("files", [{"file": "x"}]), ("fragments", None), ("extra", 1), ("state", [])]
)
def test_wrong_types_are_refused_by_field(field: str, value: Any) -> None:
    body = json.loads(dump_index(merge_parts(7, [Part("a", (FILE,), ())], {}, {})))
    body.pop("checksum")
    body[field] = value
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    with pytest.raises(CheckpointError, match=rf"^is corrupt \({field}"):
        parse_index(json.dumps(body))
