"""Kill -9 at every point of saving and at random moments, and disks that are full: earlier checkpoints stay usable."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infini_train.checkpoint.store import find_latest

# A server that has imported torch once; each line "<death> <numel> <run_dir> <step> ..." forks a child that saves these
# steps and then prunes. `death` is the number of the change to the file system (as Python's audit hooks see them)
# before which the child kills itself, 0 for never. The server answers the child's process id, then its exit status.
SERVER = """
import os, signal, sys
from pathlib import Path
import torch
from infini_train.checkpoint.fragments import whole_fragment
from infini_train.checkpoint.store import prune, save

def work(death, numel, run_dir, steps):
    count = 0
    def hook(event, arguments):
        nonlocal count
        writes = event == "open" and arguments[2] & os.O_ACCMODE != os.O_RDONLY
        if writes or event in ("os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == death:
                os.kill(os.getpid(), signal.SIGKILL)
    if death:
        sys.addaudithook(hook)
    for step in steps:
        save(Path(run_dir), step, [whole_fragment("w", "weight", torch.full((numel,), float(step)))], {}, {})
        prune(Path(run_dir), 2, None)

print("ready", flush=True)
for line in sys.stdin:
    death, numel, run_dir, *steps = line.split()
    pid = os.fork()
    if pid == 0:
        work(int(death), int(numel), run_dir, map(int, steps))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
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

    def start(self, death: int, numel: int, run_dir: Path, *steps: int) -> int:
        assert self.process.stdin is not None
        print(death, numel, run_dir, *steps, file=self.process.stdin, flush=True)
        return int(self.read())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.communicate(timeout=10)
    assert server.process.returncode == 0


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, which must be whole and hold what was saved; no problem may be reported."""
    problems: list[str] = []
    checkpoint = find_latest(run_dir, problems.append)
    assert checkpoint is not None and problems == []
    ((_, tensor),) = checkpoint.read([checkpoint.whole("w", "weight")])
    assert torch.equal(tensor, torch.full_like(tensor, float(checkpoint.step)))
    return checkpoint.step


@pytest.mark.parametrize(("before", "step"), [((1, 2, 3), 4), ((3,), 3)], ids=["a new step", "the only one again"])
def test_killed_before_every_change(server: Server, tmp_path: Path, before: tuple[int, ...], step: int) -> None:
    server.start(0, 10, tmp_path / "before", *before)
    assert server.read() == "0"
    outcomes = []
    for death in range(1, 200):
        run_dir = shutil.copytree(tmp_path / "before", tmp_path / str(death))
        server.start(death, 10, run_dir, step)
        status = server.read()
        outcomes.append(newest_step(run_dir))
        if death % 3 == 0:  # the next save is not disturbed by what was left, and removes it
            server.start(0, 10, run_dir, 5)
            assert server.read() == "0"
            assert newest_step(run_dir) == 5
            assert not list((run_dir / "checkpoints").glob(".*"))
        if status == "0":
            break
        assert status == str(-signal.SIGKILL)
    else:
        pytest.fail("the save never came to its end")
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes) and (outcomes[0], outcomes[-1]) == (3, step)


def test_killed_at_random_moments(server: Server, tmp_path: Path) -> None:
    chance = random.Random(0)
    newest = 0
    for _ in range(12):
        steps = range(newest + 1, newest + 400)
        pid = server.start(0, 500_000, tmp_path, *steps)
        latest = tmp_path / "checkpoints" / "latest"
        while not latest.is_file() or latest.read_text() <= f"step-{newest:08d}\n":
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert server.read() == str(-signal.SIGKILL)
        previous, newest = newest, newest_step(tmp_path)
        assert newest > previous
    folders = [path for path in (tmp_path / "checkpoints").iterdir() if re.fullmatch(r"step-\d+", path.name)]
    assert 1 <= len(folders) <= 4


# ----------------------------------------------------------------------------------------------------------- full disks

FILL = """
import resource, sys
from pathlib import Path
import torch
from infini_train.checkpoint.fragments import CheckpointError, whole_fragment
from infini_train.checkpoint.store import find_latest, save

folder, limit_bytes = Path(sys.argv[1]), int(sys.argv[2])
def save_step(step, numel):
    save(folder, step, [whole_fragment("w", "weight", torch.full((numel,), float(step)))], {}, {})
save_step(1, 1000)
if limit_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
for step, numel in ((2, 1_000_000), (1, 1_000_000)):
    try:
        save_step(step, numel)
    except CheckpointError as error:
        print(error)
print(sorted(path.name for path in (folder / "checkpoints").iterdir()))
print(find_latest(folder, print).step)
save_step(3, 1000)
"""


def fill(command: list[str], run_dir: Path, limit_bytes: int) -> list[str]:
    arguments = [*command, sys.executable, "-c", FILL, str(run_dir), str(limit_bytes)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_file_larger_than_allowed(tmp_path: Path) -> None:
    lines = fill([], tmp_path, 1_000_000)
    problem = f"{tmp_path}/checkpoints: file too large; the checkpoint of step "
    advice = " was not written; raise the limit on file sizes (ulimit -f)"
    assert lines == [f"{problem}2{advice}", f"{problem}1{advice}", "['latest', 'step-00000001']", "1"]


MOUNT = ["unshare", "--mount", "--map-root-user", "sh", "-c"]


def can_mount(path: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    command = [*MOUNT, 'mount -t tmpfs -o size=2m tmpfs "$0"', str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("mounting a small tmpfs is not permitted here")
    lines = fill([*MOUNT, 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"', str(disk)], disk, 0)
    problem = f"{disk}/checkpoints: no space left on device; the checkpoint of step "
    advice = " was not written; free space or lower checkpoint.keep_last"
    assert lines == [f"{problem}2{advice}", f"{problem}1{advice}", "['latest', 'step-00000001']", "1"]
