"""Real gloo processes: one dies, stops, fails or hangs in mid-operation; the others end and name rank and operation."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from infini_train.resilience.watchdog import Silence, Watchdog
from launch.ranks import read_ranks

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 8.0  # long enough for a busy machine to answer
MARGIN_S = 12.0
CASES = ("killed", "stopped", "failed", "deadlock", "well")
CASES += ("host killed", "host stopped", "host failed", "host forged")
PROGRAM = """\
import json, os, signal, socket, sys, threading, time, traceback
from pathlib import Path
import torch  # once, for all the processes that are forked below
import torch.distributed as dist
from infini_train.environment import BOARD_FD, STORE_FD
from infini_train.parallel import meeting
from infini_train.resilience.watchdog import LostRankError, Watchdog

folder, timeout_s, *cases = sys.argv[1:]


def run_rank(case, rank, place):
    "A rank of a world of three; where the case begins with host, rank 0 holds the store, and is the one in trouble."
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", GLOO_SOCKET_IFNAME="lo", INFINI_TRAIN_SECRET="a secret", **place)
    hosted = case.startswith("host")
    dist.init_process_group("gloo", store=dist.PrefixStore("groups", meeting.open_store(60)), rank=rank, world_size=3)
    x = torch.ones(1000)
    with Watchdog(rank, 3, float(timeout_s)) as watchdog:
        watchdog.write_to(Path(folder) / f"{case}.run")
        for step in range(10):
            watchdog.set_operation(f"step {step}, all-reduce")
            if step == 5 and rank == (0 if hosted else 2):
                with open(f"{folder}/{case}.trouble", "w") as stream:
                    stream.write(str(time.monotonic()))
                get_into_trouble(case.split()[-1], watchdog)
            dist.all_reduce(x)
        if rank == 1:
            for part in range(4):  # longer than the timeout: the others have finished, which is no death
                watchdog.set_operation(f"late {part}")
                time.sleep(float(timeout_s) / 2)
    assert threading.active_count() == 1
    dist.destroy_process_group()


def get_into_trouble(kind, watchdog):
    time.sleep(1)  # a heartbeat carries the operation
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(100)  # another thread may take the signal, and this one go on for a moment
    if kind == "failed":
        raise ValueError("no such lane")
    if kind == "deadlock":
        watchdog.set_operation("read a slow disk")
        time.sleep(100)
    if kind == "forged":  # by somebody who reaches the port, for longer than a silence may last
        port = int(os.environ["MASTER_PORT"])
        stranger = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        end, count = time.monotonic() + 1.5 * float(timeout_s), 0
        while time.monotonic() < end:
            names = [name for name in stranger.list_keys() if name.endswith("failure") or "beat/" in name]
            for number, name in enumerate(names):
                count += 1
                if (count + number) % 5:
                    stranger.set(name, ("no json", "[1,2]", "nobody was here", "")[count % 4])
                else:
                    stranger.delete_key(name)
            stranger.set(names[0].rpartition("beat/")[0] + "failure", "nobody was here")
            time.sleep(0.01)
        assert count > 100


def start(case, rank, place):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(f"{folder}/{case}.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    code = 1
    try:
        run_rank(case, rank, place)
        code = 0
    except (LostRankError, ValueError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def choose_place(case):
    "Variables that say where the ranks of a case meet."
    if not case.startswith("host"):
        return {name: str(os.memfd_create(name)) for name in (STORE_FD, BOARD_FD)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


ranks = {}
for case in cases:
    place = choose_place(case)
    ranks |= {start(case, rank, place): (case, rank) for rank in range(3)}
deadline = time.monotonic() + 80
ends = {}
while len(ends) < len(ranks):
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        ends[ranks[pid]] = os.waitstatus_to_exitcode(status), time.monotonic()
    time.sleep(0.01)
    for pid, (case, rank) in ranks.items():
        alone = case.endswith(("stopped", "deadlock")) and sum(other[0] == case for other in ends) == 2
        if (alone or time.monotonic() > deadline) and (case, rank) not in ends:
            os.kill(pid, signal.SIGURG)  # as the launcher and the batch script ask for stacks
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
print(json.dumps([[*key, *end] for key, end in ends.items()]))
"""


class End(NamedTuple):
    """How a rank ended: its exit code, how long after the trouble began, and what it said."""

    code: int
    seconds: float
    said: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("watch")


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[tuple[str, int], End]:
    """All cases at once: they mostly wait."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(TIMEOUT_S), *CASES],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for case, rank, code, ended in json.loads(done.stdout):
        trouble = folder / f"{case}.trouble"
        begin = float(trouble.read_text()) if trouble.exists() else ended
        found[case, rank] = End(code, ended - begin, (folder / f"{case}.{rank}").read_text())
    return found


def survivors(ends: dict[tuple[str, int], End], case: str, within_s: float) -> list[str]:
    """The last lines of the ranks that were well, which ended with an error, in time."""
    troubled = 0 if case.startswith("host") else 2
    found = [ends[case, rank] for rank in range(3) if rank != troubled]
    assert [end.code for end in found] == [1, 1], found
    assert all(end.seconds < within_s for end in found), found
    return [end.said.splitlines()[-1] for end in found]


def test_a_killed_rank_is_named_with_its_operation(ends):
    assert ends["killed", 2].code == -9
    for line in survivors(ends, "killed", TIMEOUT_S + MARGIN_S):
        assert re.match(
            r"error: .*rank 2 \(.+, process \d+\) stopped answering; last heard of in 'step 5, all-reduce'", line
        ), line
        assert line.count("'step 5, all-reduce'") == 2, "its own operation is named too"


def test_a_stopped_rank_is_named_with_its_operation(ends):
    for line in survivors(ends, "stopped", TIMEOUT_S + MARGIN_S):
        assert re.match(
            r"error: .*rank 2 \(.+, process \d+\) stopped answering; last heard of in 'step 5, all-reduce'", line
        )


def test_ranks_that_are_blocked_show_where(ends):
    said = ends["stopped", 0].said
    assert re.match(r"rank 0 was here:\n  File", said)
    assert "all_reduce" in said
    assert len(said.splitlines()) < 25


def test_every_rank_leaves_its_stacks(ends, folder):
    """Those that notice, and the one that was stopped or hangs, once it is asked."""
    for case, place in (("stopped", "get_into_trouble"), ("deadlock", "get_into_trouble")):
        logs = folder / f"{case}.run" / "launch" / "logs" / "local"
        stacks = [(logs / f"stacks-{rank}.txt").read_text() for rank in range(3)]
        assert all("in all_reduce" in text for text in stacks[:2]), stacks
        assert f"in {place}" in stacks[2] and "in _pulse" in stacks[2], "all threads of the one in trouble"
        assert (logs / "stacks-wanted").exists()
    assert list((folder / "well.run").rglob("stacks-*")) == [], "nobody asked"


def test_an_exception_is_told_to_the_others(ends):
    assert ends["failed", 2].said == "error: ValueError: no such lane\n"
    for line in survivors(ends, "failed", MARGIN_S):
        assert re.search(r"rank 2 \(.+\) failed in 'step 5, all-reduce': ValueError: no such lane", line), line


def test_a_deadlock_tells_what_each_rank_is_doing(ends):
    for line in survivors(ends, "deadlock", 2 * TIMEOUT_S + MARGIN_S):
        assert "no rank went on for 8 s;" in line
        assert "the others seem to wait for rank 2 in 'read a slow disk'; rank 0, 1 in 'step 5, all-reduce'" in line


def test_a_rank_that_has_finished_is_not_dead(ends):
    assert [ends["well", rank][::2] for rank in range(3)] == [(0, "")] * 3


@pytest.mark.parametrize("trouble", ["killed", "stopped"])
def test_a_lost_store_is_named(ends, trouble):
    for line in survivors(ends, f"host {trouble}", TIMEOUT_S + MARGIN_S):
        assert re.match(r"error: .*the store in rank 0's process (is gone|did not answer)", line), line
        assert "'step 5, all-reduce'" in line


def test_a_stranger_at_the_store_neither_ends_nor_forges_anything(ends):
    assert [ends["host forged", rank].code for rank in range(3)] == [0] * 3, ends
    said = "".join(ends["host forged", rank].said for rank in range(3))
    assert "nobody was here" not in said
    assert "heartbeat was overwritten by something that is not a rank of this run" in said


def test_a_failing_host_of_the_store_is_heard_before_it_leaves(ends):
    for line in survivors(ends, "host failed", MARGIN_S):
        assert re.search(r"rank 0 \(.+\) failed in 'step 5, all-reduce': ValueError: no such lane", line), line


def test_one_rank_needs_no_thread_and_no_store():
    before = threading.active_count()
    with Watchdog(0, 1, TIMEOUT_S) as watchdog:
        watchdog.set_operation("step 1")
        assert threading.active_count() == before
    with pytest.raises(ValueError, match="stays"), Watchdog(0, 1, TIMEOUT_S):
        raise ValueError("stays")


def test_an_absence_of_the_watcher_is_no_silence(monkeypatch):
    now = 0.0
    monkeypatch.setattr("infini_train.resilience.watchdog.time.monotonic", lambda: now)
    silence = Silence(limit_s=3.0, interval_s=0.5)
    assert not silence.lasts(1)
    now += 1000  # the machine slept
    assert not silence.lasts(1)
    for _ in range(3):
        now += 0.5
        assert not silence.lasts(1)
    now += 0.6
    assert silence.lasts(1)
    assert not silence.lasts(2)


def test_each_rank_has_written_what_it_was_doing(ends, folder):
    """For `infini-launch status`, which runs elsewhere."""
    ranks = {case: read_ranks(folder / f"{case}.run") for case in CASES}
    assert [len(found) for found in ranks.values()] == [3] * len(CASES)
    assert [entry.operation for entry in ranks["deadlock"]] == ["step 5, all-reduce"] * 2 + ["read a slow disk"]
    stopped = ranks["stopped"][2]
    assert (stopped.rank, stopped.place.split()[-2], stopped.operation) == (2, "process", "step 5, all-reduce")
