"""Ranks on this machine: what the person sees, how failures and signals end them, and that none is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infini_train import launcher
from infini_train.launcher import Ranks, launch, rank_environment
from tests.sessions import sessions

ROOT = Path(__file__).resolve().parents[1]
BEGIN = """\
import os, signal, sys, time
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
"""
LAUNCHER = "import sys; from infini_train.launcher import Ranks\nwith Ranks(3, sys.argv[1:]) as r: sys.exit(r.wait())"
SAVES_ON_SIGNAL = """
seen = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: seen.append(number))
print("ready", os.getpid())
while not seen:
    time.sleep(0.02)
time.sleep(0.5 + rank / 5)  # saving; a second delivery would come in here
print("saved", *seen)
sys.exit(128 + seen[0])
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], list[str]]:
    """The command of a rank that runs this text."""

    def write(text: str) -> list[str]:
        path = tmp_path / "rank.py"
        path.write_text(BEGIN + text)
        return [sys.executable, str(path)]

    return write


@pytest.fixture
def run(program, capfd) -> Callable[..., tuple[int, str, str]]:
    """Runs a text in ranks: exit code, what was printed, what was printed as errors."""

    def run(text: str, nproc: int = 3) -> tuple[int, str, str]:
        with Ranks(nproc, program(text)) as ranks:
            code = ranks.wait()
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def launched(program) -> Iterator[Callable[..., tuple[subprocess.Popen, list[int]]]]:
    """A launcher of its own session, as in a terminal, and the ids of its ranks once they are ready."""
    with sessions() as begin:

        def start(text: str, *prefix: str) -> tuple[subprocess.Popen, list[int]]:
            process = begin(*prefix, sys.executable, "-c", LAUNCHER, *program(text))
            assert process.stdout is not None
            return process, [int(process.stdout.readline().split()[-1]) for _ in range(3)]

        yield start


def wait_until_gone(pids: list[int], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in pids):
        assert time.monotonic() < deadline, f"left behind: {pids}"
        time.sleep(0.02)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


# ------------------------------------------------------------------------------------------------------------- console


def test_rank_0_speaks_plainly_and_the_others_are_marked(run):
    code, out, err = run("print('out', rank)\nprint('err', rank, file=sys.stderr)\nprint('no end', end='')")
    assert code == 0
    expected = ["no end", "out 0", "[rank 1] no end", "[rank 1] out 1", "[rank 2] no end", "[rank 2] out 2"]
    assert sorted(out.splitlines()) == sorted(expected)
    assert sorted(err.splitlines()) == ["[rank 1] err 1", "[rank 2] err 2", "err 0"]


def test_lines_come_live(launched):
    """The first line is there while the rank still runs."""
    process, _ = launched("print('ready', os.getpid())\ntime.sleep(60)")
    assert process.poll() is None


def test_an_error_that_is_no_end_is_shown_all_the_same(run):
    text = "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start(); t.join()\nprint('went on')"
    code, out, err = run(text, nproc=1)
    assert (code, out) == (0, "went on\n")
    assert "ZeroDivisionError" in err


def test_ranks_that_outlive_one_do_not_claim_to_save(run, tmp_path, monkeypatch):
    """The launcher asks them to end with the signal that otherwise means saving."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = """
from infini_train.resilience.signals import StopRequest
if rank == 1:
    while not os.path.exists("ready"):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
with StopRequest(confirms=rank == 0) as stop:
    if rank == 0:
        open("ready", "w").close()
    while not stop.received:
        time.sleep(0.05)
sys.exit(1)
"""
    code, _, err = run(text, nproc=2)
    assert code == 128 + signal.SIGKILL and "saving after" not in err
    assert "another rank died; ending without a checkpoint\n" in err


def test_the_environment_of_a_rank(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert rank_environment(1, 2 * cores)["OMP_NUM_THREADS"] == "1"
    found = rank_environment(0, 1)
    assert found["OMP_NUM_THREADS"] == str(cores)
    assert [found[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["0", "0", "1", "1"]
    assert found["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert rank_environment(1, 2 * cores)["OMP_NUM_THREADS"] == "3"


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_mistake_that_all_ranks_report_is_shown_once(run):
    code, out, err = run("print('error: data.train: no such folder', file=sys.stderr)\nsys.exit(2)")
    assert (code, out, err) == (2, "", "error: data.train: no such folder\n")


def test_a_failed_rank_ends_the_others_and_its_traceback_comes_last(run, monkeypatch):
    """The neighbours complain too, one of them exits first, and one doesn't listen to SIGTERM."""
    monkeypatch.setattr(launcher, "GRACE_S", 2.0)
    begin = time.monotonic()
    code, _, err = run("""
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)
shown = os.path.join(os.path.dirname(__file__), "shown")
if rank == 1:
    while not os.path.exists(shown):
        time.sleep(0.02)
    raise RuntimeError("Connection closed by peer")
import atexit
atexit.register(lambda: (open(shown, "w").close(), time.sleep(1)))  # runs once the traceback is out
raise ValueError("the cause")
""")
    assert code == 1
    assert time.monotonic() - begin < 12
    last = err[err.index("error: rank 2 failed (exit code 1)\n") :].splitlines()
    assert last[1] == "Traceback (most recent call last):"
    assert last[-1] == "ValueError: the cause"
    assert "[rank 1] RuntimeError: Connection closed by peer\n" in err


@pytest.mark.parametrize(
    ("death", "code", "line"),
    [
        ("os._exit(7)", 7, "error: rank 1 failed (exit code 7)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: rank 1 was killed by SIGKILL"),
    ],
)
def test_a_death_without_words_is_named(run, death, code, line):
    begin = time.monotonic()
    found, _, err = run(f"if rank == 1: {death}\ntime.sleep(60)")
    assert (found, err) == (code, line + "\n")
    assert time.monotonic() - begin < 5


def test_a_segfault_tells_where(run):
    code, _, err = run("if rank == 1:\n    import ctypes\n    ctypes.string_at(0)\ntime.sleep(60)")
    assert code == 128 + signal.SIGSEGV
    assert err.startswith("error: rank 1 was killed by SIGSEGV\nFatal Python error: Segmentation fault\n")
    assert "rank.py" in err


def test_the_mark_that_torch_gives_a_traceback_is_left_out(run):
    code, _, err = run(
        "print('[rank0]: Traceback (most recent call last):\\n[rank0]: E: x', file=sys.stderr); sys.exit(1)", 1
    )
    assert (code, err) == (1, "error: rank 0 failed (exit code 1)\nTraceback (most recent call last):\nE: x\n")


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_each_rank_once_and_all_are_waited_for(launched, number):
    process, pids = launched(SAVES_ON_SIGNAL)
    os.killpg(process.pid, number)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert sorted(out.splitlines()) == [f"[rank {rank}] saved {number}" for rank in (1, 2)] + [f"saved {number}"]
    wait_until_gone(pids)


def test_a_rank_that_was_stopped_by_a_signal_of_its_own_has_not_failed(run):
    """SIGTERM sent to one rank: it agrees with the others, and all of them save."""
    code, out, err = run("time.sleep(rank == 0)\nprint('saved', flush=True)\nsys.exit(143 if rank else 0)")
    assert (code, err) == (143, "")
    assert sorted(out.splitlines()) == ["[rank 1] saved", "[rank 2] saved", "saved"]


def test_a_second_ctrl_c_kills(launched):
    process, pids = launched("signal.signal(2, lambda *_: print('asked'))\nprint(os.getpid())\nwhile 1: time.sleep(9)")
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert "asked" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (130, "")
    wait_until_gone(pids)


def test_ctrl_z_stops_the_ranks_too_and_fg_goes_on(launched):
    process, pids = launched(SAVES_ON_SIGNAL)
    os.killpg(process.pid, signal.SIGTSTP)
    deadline = time.monotonic() + 5
    while {state(pid) for pid in (process.pid, *pids)} != {"T"}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGCONT)
    process.terminate()
    assert process.wait(timeout=60) == 143


def test_no_rank_outlives_a_killed_launcher(launched):
    process, pids = launched("print(os.getpid())\nsys.stdout.flush()\ntime.sleep(60)")
    process.kill()
    wait_until_gone(pids)


def test_handlers_are_put_back(run):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGTSTP)
    run("pass", nproc=1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGTSTP)) == before


# --------------------------------------------------------------------------------------------------------- the meeting


MEET = """
import contextlib
from pathlib import Path
from infini_train.parallel import meeting

store = meeting.open_store(60)
if rank == 0:
    store.set("from rank 0", "here")
assert store.get("from rank 0") == b"here"
sockets = set()
for pid in (os.getpid(), os.getppid()):
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(path))
sockets -= set(os.environ["SOCKETS_BEFORE"].split())  # of other tests
rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
print("listening:", [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets])
store.set(f"done {rank}", "")
store.wait([f"done {other}" for other in range(size)])
"""


def test_ranks_meet_without_a_port(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    own = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and path.exists()]
    monkeypatch.setenv("SOCKETS_BEFORE", " ".join(link for link in own if link.startswith("socket:")))
    code, out, err = run(MEET, nproc=2)
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == ["[rank 1] listening: []", "listening: []"]


def test_an_ignored_hangup_stays_ignored(launched):
    process, pids = launched(SAVES_ON_SIGNAL, "env", "--ignore-signal=HUP")
    process.send_signal(signal.SIGHUP)
    process.terminate()
    assert process.wait(timeout=60) == 143
    wait_until_gone(pids)


def test_a_mistake_in_a_real_run_is_told_once(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launch(2, ["train", "no-such-config"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("no-such-config") == 1 and err.count("\n") == 1
