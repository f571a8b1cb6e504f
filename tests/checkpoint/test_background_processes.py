"""Saving in the background in real processes: killed while writing, interrupted, several ranks over gloo."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infini_train.checkpoint.store import find_latest

# A server that has imported torch once. Each line "<job> <world_size> <run_dir> <number>" forks a process a rank, which
# does the job and exits. It answers "pids ...", what the ranks print, and "exits ..." with their statuses.
SERVER = """
import os, resource, signal, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from infini_train.checkpoint.background import BackgroundSaver
from infini_train.checkpoint.fragments import CheckpointError, Fragment, whole_fragment
from infini_train.config.training import CheckpointConfig

KEEP = CheckpointConfig(keep_last=2)

def say(text):
    os.write(1, f"{text}\\n".encode())

def new_saver(run_dir, barrier=lambda: None):
    return BackgroundSaver(Path(run_dir), {}, KEEP, barrier=barrier)

def weights(step, numel=1000):
    return [whole_fragment("w", "master", torch.full((numel,), float(step)))]

def stop_at(number):
    '''A barrier that lets the first save pass, then tells when it is reached this many times, and stays shut.'''
    calls = 0
    def barrier():
        nonlocal calls
        calls += 1
        if calls == 3 + number:
            say("blocked")
            threading.Event().wait()
    return barrier

def train(rank, world_size, run_dir, first_step):
    '''Adds one to the weights and saves them, without end.'''
    saver, tensor = new_saver(run_dir), torch.full((500_000,), float(first_step - 1))
    for step in range(first_step, first_step + 100_000):
        tensor.add_(1.0)
        saver.start(step, [whole_fragment("w", "master", tensor)], {}, lambda folder: say(folder.name))

def block(rank, world_size, run_dir, number):
    '''Waits for a save that never ends.'''
    with new_saver(run_dir, stop_at(number)) as saver:
        saver.start(1, weights(1), {})
        saver.start(2, weights(2), {})
        try:
            saver.wait()
        except KeyboardInterrupt:
            say("interrupted")
            raise

def leave(rank, world_size, run_dir, number):
    '''Ends, by a mistake if there is a number, while a save is under way.'''
    new_saver(run_dir, lambda: time.sleep(0.1)).start(1, weights(1), {})
    if number:
        raise SystemExit(number)

def group_saver(rank, world_size, run_dir):
    dist.init_process_group("gloo", init_method=f"file://{run_dir}/rendezvous", rank=rank, world_size=world_size)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=20))
    barrier = lambda: dist.barrier(group)
    return BackgroundSaver(Path(run_dir), {}, KEEP, rank=rank, world_size=world_size, barrier=barrier)

def together(rank, world_size, run_dir, number):
    '''Columns of a matrix; the main thread adds up values of all ranks while the thread saves.'''
    with group_saver(rank, world_size, run_dir) as saver:
        columns = torch.zeros(100, 30)
        for step in range(1, 6):
            columns.fill_(0.0).add_(torch.arange(30.0) + 30 * rank + step)
            place = ((100, 30 * world_size), (0, 30 * rank), (100, 30), 0)
            saver.start(step, [Fragment("w", "master", *place, columns.reshape(-1))], {"by": rank})
            for _ in range(20):
                columns.fill_(1.0)
                dist.all_reduce(columns)
                assert bool((columns == world_size).all())
    dist.destroy_process_group()

def failing(rank, world_size, run_dir, victim):
    '''One rank can't write large files: all hear of it, at the same step, and may go on.'''
    saver = group_saver(rank, world_size, run_dir)
    for step, limit_bytes in ((1, None), (2, 100_000), (3, None)):
        soft = limit_bytes if limit_bytes and rank == victim else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        piece = torch.full((100_000,), float(step))
        saver.start(step, [Fragment("w", "master", (200_000,), (100_000 * rank,), (100_000,), 0, piece)], {})
        try:
            saver.wait()
        except CheckpointError as error:
            say(f"rank {rank} step {step}: {error}")
    dist.destroy_process_group()

def bereft(rank, world_size, run_dir, number):
    '''The last rank is killed while the others wait for it.'''
    saver = group_saver(rank, world_size, run_dir)
    saver.start(1, weights(1) if rank == 0 else [], {})
    saver.wait()
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    saver.start(2, weights(2) if rank == 0 else [], {})
    try:
        saver.wait()
    except CheckpointError as error:
        say(f"rank {rank}: {error}")
    os._exit(0)  # gloo's own end would wait for the lost one

print("ready", flush=True)
for line in sys.stdin:
    job, world_size, run_dir, number = line.split()
    pids = []
    for rank in range(int(world_size)):
        pid = os.fork()
        if pid == 0:
            sys.stdin = open(os.devnull)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            globals()[job](rank, int(world_size), run_dir, int(number))
            sys.exit(0)
        pids.append(pid)
    say("pids " + " ".join(map(str, pids)))
    say("exits " + " ".join(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids))
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, job: str, run_dir: Path, world_size: int = 1, number: int = 0) -> None:
        assert self.process.stdin is not None
        run_dir.mkdir(exist_ok=True)
        print(job, world_size, run_dir, number, file=self.process.stdin, flush=True)

    def expect(self, start: str) -> tuple[str, list[str]]:
        """The next line that begins so, without its beginning, and the lines before it."""
        before: list[str] = []
        while not (line := self.read()).startswith(start):
            assert self.process.poll() is None, before
            before.append(line)
        return line.removeprefix(start).strip(), before

    def start(self, job: str, run_dir: Path, number: int = 0) -> int:
        """Begins a job of one process; its id. The process may have printed before; those lines are dropped."""
        self.send(job, run_dir, 1, number)
        return int(self.expect("pids")[0])

    def run(self, job: str, run_dir: Path, world_size: int = 1, number: int = 0) -> tuple[str, list[str]]:
        """A job to its end: exit statuses of the ranks, and what they printed."""
        self.send(job, run_dir, world_size, number)
        statuses, lines = self.expect("exits")
        return statuses, sorted(line for line in lines if not line.startswith("pids"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.communicate(timeout=20)
    assert server.process.returncode == 0


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, which must be whole and hold what was saved; no problem may be reported."""
    problems: list[str] = []
    checkpoint = find_latest(run_dir, problems.append)
    assert checkpoint is not None and problems == []
    ((_, tensor),) = checkpoint.read([checkpoint.whole("w", "master")])
    assert torch.equal(tensor, torch.full_like(tensor, float(checkpoint.step)))
    return checkpoint.step


@pytest.mark.parametrize(("number", "newest"), [(1, 1), (2, 1), (3, 2)])
def test_killed_while_the_thread_is_at_work(server: Server, tmp_path: Path, number: int, newest: int) -> None:
    pid = server.start("block", tmp_path, number)
    server.expect("blocked")
    os.kill(pid, signal.SIGKILL)
    assert server.expect("exits")[0] == str(-signal.SIGKILL)
    assert newest_step(tmp_path) == newest


def test_killed_at_random_moments_of_training(server: Server, tmp_path: Path) -> None:
    chance = random.Random(0)
    newest = 0
    for _ in range(10):
        pid = server.start("train", tmp_path, newest + 1)
        server.expect("step-")
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert server.expect("exits")[0] == str(-signal.SIGKILL)
        previous, newest = newest, newest_step(tmp_path)
        assert newest > previous
    folders = [path for path in (tmp_path / "checkpoints").iterdir() if re.fullmatch(r"step-\d+", path.name)]
    assert 1 <= len(folders) <= 4


def test_interrupted_while_waiting(server: Server, tmp_path: Path) -> None:
    pid = server.start("block", tmp_path, 2)
    server.expect("blocked")
    os.kill(pid, signal.SIGINT)
    server.expect("interrupted")  # the interpreter still waits for the thread: a second Ctrl-C cuts it off
    assert newest_step(tmp_path) == 1
    os.kill(pid, signal.SIGKILL)
    server.expect("exits")
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("status", [0, 3])
def test_a_program_that_ends_waits_for_its_save(server: Server, tmp_path: Path, status: int) -> None:
    assert server.run("leave", tmp_path, number=status) == (str(status), [])
    assert newest_step(tmp_path) == 1


# ------------------------------------------------------------------------------------------------------- several ranks


def test_two_ranks_save_while_they_compute_together(server: Server, tmp_path: Path) -> None:
    assert server.run("together", tmp_path, 2) == ("0 0", [])
    checkpoint = find_latest(tmp_path, pytest.fail)
    assert checkpoint is not None and checkpoint.step == 5 and checkpoint.state == {"by": 0}
    ((_, tensor),) = checkpoint.read([checkpoint.whole("w", "master")])
    assert torch.equal(tensor.view(100, 60), (torch.arange(60.0) + 5).expand(100, 60))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_can_not_write_fails_all_and_the_next_save_works(
    server: Server, tmp_path: Path, victim: int
) -> None:
    statuses, lines = server.run("failing", tmp_path, 2, victim)
    assert statuses == "0 0"
    own = "file too large; the checkpoint of step 2 was not written; raise the limit on file sizes (ulimit -f)"
    other = "the checkpoint of step 2 was not written: "
    other += "another rank failed; see its error" if victim == 0 else "rank 1 of 2 failed; see its error"
    reasons = [own, other] if victim == 0 else [other, own]
    assert lines == [f"rank {rank} step 2: {tmp_path}/checkpoints: {reasons[rank]}" for rank in range(2)]
    checkpoint = find_latest(tmp_path, pytest.fail)
    assert checkpoint is not None and checkpoint.step == 3
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000001", "step-00000003"]


def test_a_lost_rank_is_an_error_of_the_others_and_nobody_hangs(server: Server, tmp_path: Path) -> None:
    statuses, (line,) = server.run("bereft", tmp_path, 2)
    assert statuses == f"0 {-signal.SIGKILL}"
    assert line.startswith(f"rank 0: {tmp_path}: saving step 2 failed: ")
    assert newest_step(tmp_path) == 1
