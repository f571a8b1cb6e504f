"""Files beside the checkpoints: a disk that refuses them is warned of once, and ends no training."""

import contextlib
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from infini_train.checkpoint import store
from infini_train.train.loop import train
from infini_train.train.side_files import Lines, SideFiles


@contextlib.contextmanager
def file_limit(size_bytes: int) -> Iterator[None]:
    """No file grows beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_that_found_no_room_are_written_later(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "x.jsonl")
    lines.append("first")
    with file_limit(10):
        for line in ("second", "third"):
            with pytest.raises(OSError, match="File too large"):
                lines.append(line)
        assert (tmp_path / "x.jsonl").read_text() == "first\nseco", "the disk took a part"
    lines.append("fourth")
    lines.close()
    assert (tmp_path / "x.jsonl").read_text() == "first\nsecond\nthird\nfourth\n"


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x.jsonl").symlink_to("victim")
    with pytest.raises(OSError, match="is a link"):
        Lines(tmp_path / "x.jsonl").append("line")
    assert (tmp_path / "victim").read_text() == "precious"


def test_each_file_is_warned_of_once(tmp_path: Path, lines: list[str]) -> None:
    files = SideFiles()
    for name in ("a", "b", "a"):
        with files.tolerate(tmp_path / name):
            raise OSError(28, "No space left on device")
    assert lines == [
        f"warning: {tmp_path / name} can't be written: No space left on device; training goes on without it"
        for name in ("a", "b")
    ]
    with pytest.raises(ZeroDivisionError), files.tolerate(tmp_path):
        raise ZeroDivisionError


def test_training_goes_on_without_them(configure, lines) -> None:
    config = configure("log.profile_steps=[2]")
    config.directory.mkdir()
    (config.directory / "status.json").mkdir()  # can't be replaced by a file
    for name in ("tensorboard", "profile"):
        (config.directory / name).write_text("not a folder")
    assert train(config).step == config.train.total_steps
    assert store.resolve(config.directory).name == "step-00000006"
    warned = [line.split()[1].rpartition("/")[2] for line in lines if "goes on without it" in line]
    assert sorted(warned) == ["profile", "status.json", "tensorboard"]
    rows = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/train" in row] == [1, 2, 3, 4, 5, 6]


def test_planted_files_are_not_written_through(configure, tmp_path: Path) -> None:
    config = configure()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    checkpoints = config.directory / "checkpoints"
    checkpoints.mkdir(parents=True)
    for path in (
        *(config.directory / name for name in ("status.json", "metrics.jsonl", "config.yaml", "findings.jsonl")),
        checkpoints / ".latest.tmp",
        checkpoints / ".step-00000003.tmp-save",
    ):
        path.symlink_to(victim)
    assert train(config).step == config.train.total_steps
    metrics = config.directory / "metrics.jsonl"
    assert victim.read_text() == "precious" and not metrics.is_symlink()
    metrics.unlink()
    os.mkfifo(metrics)  # opening it would wait for a reader
    assert train(configure("train.max_steps=7")).step == 7
    assert metrics.is_file()
