"""A run of several processes that loses one: the others end, with a line that names the rank and the operation."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infini_train.config_file import dump

pytestmark = pytest.mark.slow
TIMEOUT_S = 6


@contextlib.contextmanager
def run(configure, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """An endless run of three ranks that has begun to train, and the file with what it says."""
    config = configure(
        "train.batch_lanes=3",
        "train.micro_batch_lanes=1",
        "train.max_steps=100000",
        f"parallel.timeout_s={TIMEOUT_S}",
        "log.every_steps=10",
        "checkpoint.every_steps=1000000",
    )
    (tmp_path / "lost.yaml").write_text(dump(config))
    console = tmp_path / "console.txt"
    command = [sys.executable, "-m", "infini_train.cli", "train", str(tmp_path / "lost.yaml"), "--nproc", "3"]
    with console.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, text=True) as process:
        try:
            while "step " not in console.read_text():
                assert process.poll() is None, console.read_text()
                time.sleep(0.2)
            yield process, console
        finally:
            process.kill()


def find_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


OPERATION = r"'(step \d+, [a-z ]+|validation at step \d+).*'"


def test_a_killed_rank_ends_the_run_and_is_named(configure, tmp_path):
    with run(configure, tmp_path) as (process, console):
        os.kill(find_rank(process, 1), signal.SIGKILL)
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
        text = console.read_text()
    assert text.rstrip().endswith("error: rank 1 was killed by SIGKILL")
    assert re.search(rf"error: rank [02]: {OPERATION} failed because rank 1 \(.*\) stopped answering", text), text


def test_a_stopped_rank_ends_the_run_and_is_named(configure, tmp_path):
    with run(configure, tmp_path) as (process, console):
        victim = find_rank(process, 2)
        os.kill(victim, signal.SIGSTOP)
        assert process.wait(timeout=TIMEOUT_S + 60) == 1
        text = console.read_text()
    assert re.search(rf"error: rank 2 \(.*\) stopped answering; last heard of in {OPERATION}", text), text
    assert not Path(f"/proc/{victim}").exists(), "the stopped rank was left behind"
