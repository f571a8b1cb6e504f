"""A run of several processes that loses one: the others end, with a line that names the rank and the operation."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infini_train.config.files import dump
from infini_train.train.run_folder import hold_folder
from launch.ranks import describe_trouble, read_ranks

pytestmark = pytest.mark.slow
TIMEOUT_S = 6


@contextlib.contextmanager
def run(configure, tmp_path: Path, timeout_s: float = TIMEOUT_S) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """An endless run of three ranks that has begun to train, and the file with what it says."""
    config = configure(
        "train.batch_lanes=3",
        "train.micro_batch_lanes=1",
        "train.max_steps=100000",
        f"parallel.timeout_s={timeout_s}",
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
    (logs,) = tmp_path.rglob("launch/logs/local")
    stacks = [(logs / f"stacks-{rank}.txt").read_text() for rank in range(3)]
    assert all("in run_steps" in text for text in stacks), "of all ranks, the stopped one too"


def test_a_slow_rank_is_named(configure, tmp_path):
    """One that gets a quarter of its time."""
    with run(configure, tmp_path, timeout_s=60) as (process, _):
        (folder,) = tmp_path.rglob("launch/ranks")
        victim, deadline, said = find_rank(process, 1), time.monotonic() + 120, ""
        while "slow" not in said and time.monotonic() < deadline:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.03)
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.01)
            said = describe_trouble(read_ranks(folder.parents[1]))
    assert re.match(r"rank 1 on \S+ slow: [\d.]+ s of own work per step, the others [\d.]+ s", said), said


def test_a_long_look_for_the_checkpoint_is_no_death(configure, tmp_path):
    """Tasks of srun, where rank 0 hosts the store and alone reads and hashes the newest checkpoint."""
    config = configure(
        "train.batch_lanes=2", "train.micro_batch_lanes=1", "train.max_steps=3", f"parallel.timeout_s={TIMEOUT_S}"
    )
    (tmp_path / "slow.yaml").write_text(dump(config))
    program = f"""
import time
from infini_train.checkpoint import store
find = store.find_latest
store.find_latest = lambda *arguments: (time.sleep({3 * TIMEOUT_S}), find(*arguments))[1]
from infini_train.cli import main
main(["train", "slow.yaml"])
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, **meeting, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [(rank.communicate(timeout=100)[1], rank.returncode) for rank in ranks] == [("", 0)] * 2


def test_a_folder_that_is_held_is_refused_by_all_ranks_in_one_line(configure, tmp_path):
    config = configure()
    (tmp_path / "run.yaml").write_text(dump(config))
    with hold_folder(config.directory, is_first=True):
        command = [sys.executable, "-m", "infini_train.cli", "train", str(tmp_path / "run.yaml"), "--nproc", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert list(config.directory.iterdir()) == [config.directory / ".lock"]
    assert done.returncode == 2 and "was here" not in done.stderr
    refused = f"error: run_dir: another process is training in {config.directory}; wait for it or stop it"
    assert {line.removeprefix("[rank 1] ") for line in done.stderr.splitlines() if "run_dir" in line} == {refused}


def test_a_folder_that_rank_0_cannot_write_is_refused_by_all_ranks_in_one_line(configure, tmp_path):
    config = configure()
    (tmp_path / "run.yaml").write_text(dump(config))
    (config.directory / "config.yaml").mkdir(parents=True)
    command = [sys.executable, "-m", "infini_train.cli", "train", str(tmp_path / "run.yaml"), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "was here" not in done.stderr
    assert f"error: run_dir: {config.directory} can't be written: Is a directory" in done.stderr
