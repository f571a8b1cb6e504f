"""`infini-launch local`: signals, ends and retries, with ranks that are real processes but don't train."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import newest_checkpoint
from tests.sessions import SAVES, sessions

LOCAL = """\
import sys
from pathlib import Path
from launch.cluster import RestartConfig
from launch.job import Job
from launch.local import run_locally
run_dir, sys.executable = sys.argv[1:]  # what the launcher starts instead of Python
job = Job(name="x", config="debug", settings=(), run_dir=run_dir, nodes=1, exports={"OF_THE_JOB": "set"})
sys.exit(run_locally(job, 2, RestartConfig(max_retries=2, backoff_s=0)))
"""


@pytest.fixture
def local(tmp_path):
    """Starts `run_locally` with ranks that run this text."""
    with sessions() as begin:

        def start(text: str) -> subprocess.Popen[str]:
            rank = tmp_path / "rank"
            rank.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{text}")
            rank.chmod(0o755)
            return begin(sys.executable, "-c", LOCAL, str(tmp_path / "run"), str(rank))

        yield start


def read_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[-1]) for _ in range(2)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_that_fails_while_it_stops_is_not_started_again(local):
    process = local(SAVES.replace("sys.exit(128 + seen[0])", "sys.exit(1)"))
    read_pids(process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ready" not in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_the_ranks_and_is_not_retried(local, number):
    process = local(SAVES)
    pids = read_pids(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert sorted(out.splitlines()) == [f"[rank 1] saved {number.value}", f"saved {number.value}"]
    assert not any(map(is_running, pids))


def test_nothing_is_left_of_a_killed_one(local):
    process = local(SAVES)
    pids = read_pids(process)
    process.kill()
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"left behind: {pids}"
        time.sleep(0.02)


def test_a_failure_is_retried_with_the_jobs_environment(local):
    text = "print(os.environ['INFINI_TRAIN_RESTARTS'], os.environ['OF_THE_JOB']) if os.environ['RANK'] == '0' else 0\n"
    process = local(text + "time.sleep(0.2); os._exit(1 if os.environ['INFINI_TRAIN_RESTARTS'] == '0' else 0)")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines() == ["0 set", "1 set"]


def test_the_checkpoint_saved_last_counts_as_the_newest(tmp_path):
    """Not a damaged one with a higher number, from before the run went back."""
    checkpoints = tmp_path / "checkpoints"
    assert newest_checkpoint(tmp_path) == ""
    for step in (500, 410):
        (checkpoints / f"step-00000{step}").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == "step-00000500"
    (checkpoints / "latest").write_text("step-00000410\n")
    assert newest_checkpoint(tmp_path) == "step-00000410"
