"""The files that stacks go to."""

import os
import signal
from pathlib import Path

import pytest

from infini_train.resilience.stack_dumps import DUMP_SIGNAL, WANTED, StackDumps


def test_stacks_are_dumped_on_the_signal_and_kept(tmp_path: Path) -> None:
    stacks = StackDumps(tmp_path / "logs", 3)
    try:
        os.kill(os.getpid(), DUMP_SIGNAL)
        signal.sigpending()
    finally:
        stacks.close()
    assert "test_stacks_are_dumped" in (tmp_path / "logs" / "stacks-3.txt").read_text()


def test_a_file_without_stacks_is_removed(tmp_path: Path) -> None:
    StackDumps(tmp_path, 0).close()
    assert list(tmp_path.iterdir()) == []


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "stacks-0.txt").symlink_to("victim")
    with pytest.raises(OSError, match="is a link"):
        StackDumps(tmp_path, 0)
    (tmp_path / "stacks-0.txt").unlink()
    (tmp_path / WANTED).symlink_to(tmp_path / "new")
    stacks = StackDumps(tmp_path, 0)
    with pytest.raises(OSError, match="is a link"):
        stacks.dump()
    stacks.close()
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "new").exists()
