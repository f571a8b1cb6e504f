"""What tasks have left for each other: any changed byte is told, and following the advice mends it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import plan
from data_tools.clean import CleanOptions, clean_corpus
from data_tools.encode import EncodeOptions, encode_corpus
from data_tools.task_files import check_files
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import hash_file


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corpus of several tasks."""
    monkeypatch.setattr(plan, "_MIN_TASK_BYTES", 3000)
    rows = [{"id": f"d{i}", "text": f"Text {i % 90}: grün\n" * (i % 7 + 1)} for i in range(120)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(tmp_path / "c.jsonl")


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, place: float) -> None:
    """Another bit at this share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def encode(source: str, out: Path, part: str | None = None) -> None:
    encode_corpus([source], "byte", out, EncodeOptions(holdout=0.2, part=part))


def clean(source: str, out: Path, part: str | None = None) -> None:
    clean_corpus([source], out, CleanOptions(dedup=True, part=part))


def check_mended(work: Callable[..., None], source: str, out: Path, task: Path) -> None:
    """The damage of a task is told in one line; without the task, the result is that of a run without damage."""
    with pytest.raises(ConfigError, match=rf"; remove {task} and rerun the command, which makes it again$") as error:
        work(source, out, "2/2")
    assert "\n" not in str(error.value) and not out.exists()
    shutil.rmtree(task)
    work(source, out, "1/2")
    work(source, out, "2/2")
    work(source, out.with_name("whole"))
    assert hashes(out) == hashes(out.with_name("whole"))


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["record.json", "files.json", "train.idx", "validation.idx", "validation-00000.tar"])
def test_damage_in_an_encoding_task(source, tmp_path, name, place) -> None:
    encode(source, tmp_path / "set", "1/2")
    task = tmp_path / ".set.partial" / "task-000000"
    flip(task / name, place)
    check_mended(encode, source, tmp_path / "set", task)


@pytest.mark.parametrize("name", ["record.json", "train.idx", "train-00000.tar"])
def test_a_missing_file_of_an_encoding_task(source, tmp_path, name) -> None:
    encode(source, tmp_path / "set", "1/2")
    task = tmp_path / ".set.partial" / "task-000000"
    (task / name).unlink()
    check_mended(encode, source, tmp_path / "set", task)


def test_damage_in_a_cleaning_task(source, tmp_path) -> None:
    """In the keys of its texts, in what was found to be duplicates, in its record."""
    out = tmp_path / "set"
    clean(source, out, "1/2")
    keys = tmp_path / ".set.partial" / "keys"
    flip(keys / "task-000000" / "exact", 0.5)
    with pytest.raises(ConfigError, match=f"exact: is not as it was written .*; remove {keys / 'task-000000'} and"):
        clean(source, out, "2/2")
    shutil.rmtree(keys / "task-000000")
    clean(source, out, "1/2")  # the last one to look goes on
    task = tmp_path / ".set.partial" / "task-000000"
    flip(task / "record.json", 0.3)
    with pytest.raises(ConfigError, match=f"record.json: is not as it was written .*; remove {task} and"):
        clean(source, out, "2/2")
    shutil.rmtree(task)
    clean(source, out, "1/2")
    clean(source, tmp_path / "whole")
    one, whole = hashes(out), hashes(tmp_path / "whole")
    assert one == whole and len(one) > 3
    (out / "report.json").write_text("[" * 9)
    with pytest.raises(ConfigError, match="a cleaned corpus is there already"):
        clean(source, out, "1/2")


def test_damage_in_the_duplicates_that_were_found(source, tmp_path) -> None:
    out = tmp_path / "set"
    clean(source, out, "1/2")
    clean(source, out, "2/2")
    found = tmp_path / ".set.partial" / "exact"
    flip(next(found.glob("*.npy")), 0.9)
    check_files.cache_clear()  # as in another process
    with pytest.raises(ConfigError, match=rf"\.npy: is not as it was written .*; remove {found} and rerun"):
        clean(source, out, "1/2")


def test_damage_in_the_plan(source, tmp_path) -> None:
    """Of command and sources; the list of tasks is compared byte by byte."""
    encode(source, tmp_path / "set", "1/2")
    folder = tmp_path / ".set.partial"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jsonl")}
    assert len(before) == 3
    rng = random.Random(3)
    for name, data in before.items():
        for place in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))}:
            changed = bytearray(data)
            changed[place] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(changed)
            try:
                encode(source, tmp_path / "set", "1/2")
            except ConfigError as error:
                assert "\n" not in str(error) and "restart" in str(error)
            else:
                assert json.loads(changed) == json.loads(data), "only the spelling differs"
        (folder / name).write_bytes(data)
    encode(source, tmp_path / "set", "2/2")
    assert (tmp_path / "set").exists()
