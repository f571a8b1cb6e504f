"""Crash and hang detection: ranks watch each other through torch's store, and name who failed in which operation.

Each rank publishes a heartbeat and watches its right neighbour's, so the store's load per rank and second is constant.
The first rank to notice a failure writes a report; all others read it and exit with it, even in the middle of a
collective, which nothing but the end of the process can interrupt.

Time is counted in ticks of the watching rank: a process that was suspended, alone or with all others, does not mistake
its own absence for its neighbour's.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from torch.distributed import PrefixStore, TCPStore

from infini_train import exit_codes
from infini_train.resilience.rank_status import RankStatus
from infini_train.resilience.stack_dumps import StackDumps, logs_folder

LOG = logging.getLogger(__name__)

MAX_INTERVAL_S = 0.5
MAX_TEXT = 200
SETTLE_S = 2.0  # after a lost connection, a rank without a heartbeat for this long counts as dead
LEAVE_S = 3.0  # how long a rank with an error of its own may take to exit with it
STACK_LINES = 6
OPENING = "opening the run"  # has no timeout, since checkpoints are hashed and read; only a dead rank ends it


class LostRankError(RuntimeError):
    """An operation failed because of another rank; the message is one line that names both."""


class Beat(NamedTuple):
    """A rank's heartbeat."""

    count: int
    operation: str
    finished: bool
    place: str  # "host, process 123"

    def describe_lost(self, rank: int) -> str:
        """What to say of this rank if no other heartbeat follows."""
        return f"rank {rank} ({self.place}) stopped answering; last heard of in '{self.operation}'"


class Watchdog:
    """Inside the context, a rank that dies, hangs or fails ends all ranks, with a line that names rank and operation.

    A failure noticed while this rank is blocked ends the process at once with exit code 1. An exception that leaves the
    context is reported to the other ranks; a RuntimeError that another rank caused becomes a `LostRankError`. Rank 0
    waits at the end until all others have left, since the store may live in its process. With one rank it does nothing.

    Args:
        rank: this process.
        world_size: number of processes; MASTER_ADDR and MASTER_PORT say where their store is (torchrun's, or rank 0's).
        timeout_s: longest time without a heartbeat of a rank, and longest time in which no rank begins an operation.
        name: of this watchdog in the store, for one that follows another.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, name: str = "train") -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.interval_s = min(MAX_INTERVAL_S, timeout_s / 10)
        self.operation = "start"
        self._operations = 0
        self._prefix = f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
        self._place = f"{socket.gethostname()}, process {os.getpid()}"
        self._store: PrefixStore | None = None
        self._failure = ""  # the report as it was read, in case the store is lost too
        self._ticks = 0
        self._wake = threading.Event()
        self._finished = threading.Event()  # left the context without an error
        self._failing = threading.Event()  # the main thread has an error and exits with it
        self._left = threading.Event()  # the main thread is out of the context
        self._one_end = threading.Lock()  # only one of the two threads ends the process
        self._pulse_thread: threading.Thread | None = None
        self._rank_status: RankStatus | None = None
        self._stacks: StackDumps | None = None

    def __enter__(self) -> Self:
        if self.world_size > 1:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._pulse_thread = threading.Thread(target=self._pulse, args=address, name="watch pulse", daemon=True)
            self._pulse_thread.start()
            self._guard_thread = threading.Thread(target=self._guard, name="watch guard", daemon=True)
            self._guard_thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pulse_thread is None:
            return
        if self._rank_status:
            self._rank_status.close(LEAVE_S)
        if error is None:
            self.set_operation("wait for the other ranks at the end")
            self._finished.set()
            self._wake.set()
            self._pulse_thread.join()
            self._left.set()
            self._guard_thread.join()
            self._close_stacks()
            return
        self._failing.set()
        lost = self._find_cause(error)
        if self.rank == 0 and not is_agents_store():
            self._wait_until_heard()  # the store ends with this process
        self._left.set()
        self._wake.set()
        for thread in (self._pulse_thread, self._guard_thread):  # coming back into a dying interpreter would crash it
            thread.join(LEAVE_S)
        self._close_stacks()
        if lost is not None:
            raise LostRankError(lost) from error

    def set_operation(self, operation: str) -> None:
        """Names what this rank does from now on; cheap enough to call for each part of a step."""
        LOG.debug(operation)
        self.operation = operation
        self._operations += 1

    def record_step(self, own_s: float, step_s: float) -> None:
        """Seconds of a step, and of this rank's own work in it, which no other rank can delay."""
        if self._rank_status:
            self._rank_status.step_seconds.append((own_s, step_s))

    def write_to(self, run_dir: Path) -> None:
        """From now on this rank reports there what it does, every few seconds, and its stacks in a hang."""
        if self.world_size > 1:
            folder = run_dir / "launch" / "ranks"
            self._rank_status = RankStatus(folder, self.rank, self.world_size, self._place, self.timeout_s / 4)
            self._rank_status.start(lambda: (self._operations, self.operation))
            with contextlib.suppress(OSError):
                self._stacks = StackDumps(logs_folder(run_dir), self.rank)

    # -------------------------------------------------------------------------------------------------- own errors

    def _find_cause(self, error: BaseException) -> str | None:
        """Another rank's failure, as one line; None: the error is this rank's own, and is reported to the others."""
        deadline = time.monotonic() + LEAVE_S
        while self._store is None and time.monotonic() < deadline:  # the pulse is still connecting
            time.sleep(self.interval_s / 4)
        text = " ".join(str(error).split())[:MAX_TEXT]
        own = f"rank {self.rank} ({self._place}) failed in '{self.operation}': {type(error).__name__}: {text}"
        try:
            cause = self._await_report() if isinstance(error, RuntimeError) and self._store else None
            if cause is None:
                if self._store is not None:
                    self._report(own)
                return None
        except RuntimeError:
            cause = self._failure or f"{describe_store()} is gone"
        return f"rank {self.rank}: '{self.operation}' failed because {cause} ({text})"

    def _wait_until_heard(self) -> None:
        deadline = time.monotonic() + LEAVE_S
        with contextlib.suppress(RuntimeError):
            while self._store and time.monotonic() < deadline and self._store.add("heard", 0) < self.world_size:
                time.sleep(self.interval_s / 4)

    def _await_report(self) -> str | None:
        """What the others find within `SETTLE_S`; otherwise a rank whose heartbeat has stopped."""
        first = self._read_beats()
        deadline = time.monotonic() + max(SETTLE_S, 4 * self.interval_s)
        while time.monotonic() < deadline:
            if report := self._read("failure").decode():
                return report
            time.sleep(self.interval_s / 2)
        for rank, (before, now) in enumerate(zip(first, self._read_beats(), strict=True)):
            if rank != self.rank and before is not None and before == now and not now.finished:
                return self._report(now.describe_lost(rank))
        return None

    # --------------------------------------------------------------------------------------------------------- threads

    def _pulse(self, host: str, port: int) -> None:
        """Publishes heartbeats and checks the others until this rank leaves."""
        progress = Silence(self.timeout_s + 4 * self.interval_s, self.interval_s)  # dead ranks are reported first
        neighbour, published = Neighbour(self), -1
        try:
            # A connection of its own: the main thread's may be blocked in a wait.
            timeout = timedelta(seconds=self.timeout_s)
            client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            self._store = PrefixStore(self._prefix, client)
            while not (self._failing.is_set() and self._left.is_set()):
                finished = self._finished.is_set()
                operations = self._operations + (self._ticks if self.operation == OPENING else 0)
                beat = Beat(self._ticks, self.operation, finished, self._place)
                self._store.set(f"beat/{self.rank}", json.dumps(beat))
                if report := self._read("failure").decode():
                    self._failure = report
                    self._store.add("heard", 1)
                    return self._end(f"{report}; this rank was in '{self.operation}'")
                if finished and (self.rank != 0 or self._have_all_finished()):
                    return None
                neighbour.check()
                if progress.lasts(self._store.add("operations", int(operations != published))):
                    self._report(f"no rank went on for {self.timeout_s:g} s; {self._describe_all()}")
                published = operations
                self._ticks += 1
                self._wake.wait(self.interval_s)
                self._wake.clear()
        except RuntimeError as error:
            text = " ".join(str(error).split())[:MAX_TEXT]
            return self._end(f"{describe_store()} is gone; this rank was in '{self.operation}' ({text})")

    def _guard(self) -> None:
        """Ends this rank if the pulse thread hangs: a request to a suspended store has no timeout of its own."""
        silence = Silence(self.timeout_s + 2 * self.interval_s, self.interval_s)
        while not self._left.wait(self.interval_s):
            if silence.lasts(self._ticks):
                seconds = f"for {self.timeout_s:g} s"
                self._end(f"{describe_store()} did not answer {seconds}; this rank was in '{self.operation}'")
                return

    def _end(self, message: str) -> None:
        """Ends the process wherever its main thread is, unless that is about to exit with an error of its own.

        Writes past `logging`, whose locks the main thread may hold.
        """
        self._one_end.acquire()
        if self._failing.wait(1.0) and self._left.wait(LEAVE_S):
            return
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame, STACK_LINES)) if frame else ""
        if self._stacks:
            with contextlib.suppress(OSError, ValueError):  # the disk is full, or the main thread has closed it
                self._stacks.dump()
        sys.stderr.write(f"rank {self.rank} was here:\n{stack}error: {message}\n")
        sys.stderr.flush()
        os._exit(exit_codes.FAILED)

    def _close_stacks(self) -> None:
        if self._stacks:
            with contextlib.suppress(OSError):
                self._stacks.close()

    # ----------------------------------------------------------------------------------------------------------- store

    def _read(self, key: str) -> bytes:
        """Empty if there is nothing; unlike `get`, it never waits for the key."""
        assert self._store is not None
        return self._store.compare_set(key, "", "")

    def _read_beat(self, rank: int) -> Beat | None:
        """None: that rank has not published one yet."""
        text = self._read(f"beat/{rank}")
        return Beat(*json.loads(text)) if text else None

    def _read_beats(self) -> list[Beat | None]:
        return [self._read_beat(rank) for rank in range(self.world_size)]

    def _have_all_finished(self) -> bool:
        return all(beat is not None and beat.finished for beat in self._read_beats())

    def _report(self, text: str) -> str:
        """Reports a failure to all ranks unless one was reported before; returns the first."""
        assert self._store is not None
        return self._store.compare_set("failure", "", text).decode()

    def _describe_all(self) -> str:
        """Each rank's operation, grouped; first the few ranks that the others wait for."""
        ranks: dict[str, list[int]] = {}
        for rank, beat in enumerate(self._read_beats()):
            ranks.setdefault(beat.operation if beat else "not started", []).append(rank)
        groups = sorted(ranks.items(), key=lambda item: len(item[1]))
        lines = [f"rank {', '.join(map(str, found))} in '{name}'" for name, found in groups]
        if len(groups) > 1 and len(groups[0][1]) < len(groups[1][1]):
            lines[0] = f"the others seem to wait for {lines[0]}"
        return "; ".join(lines)


def is_agents_store() -> bool:
    """Whether the store lives in the launcher's process (torchrun, --nproc); otherwise in rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def describe_store() -> str:
    """Where it is."""
    return f"the store in {'the launcher' if is_agents_store() else 'rank 0'}'s process"


class Silence:
    """For how long a value has stayed the same, in the watching rank's own time."""

    def __init__(self, limit_s: float, interval_s: float) -> None:
        self.limit_s, self.most_s = limit_s, 2 * interval_s  # after a longer gap this process itself was suspended
        self.value: Any = None
        self.lasted_s, self.checked = 0.0, time.monotonic()

    def lasts(self, value: Any) -> bool:
        """Whether the value has been this one for the limit, as of now."""
        now = time.monotonic()
        self.lasted_s = self.lasted_s + min(now - self.checked, self.most_s) if value == self.value else 0.0
        self.value, self.checked = value, now
        return self.lasted_s >= self.limit_s


class Neighbour:
    """The next rank to the right that has not finished."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog, self.rank = watchdog, (watchdog.rank + 1) % watchdog.world_size
        self.silence = Silence(watchdog.timeout_s, watchdog.interval_s)

    def check(self) -> None:
        """Reads its heartbeat; reports the rank when that has stopped."""
        watchdog = self.watchdog
        if self.rank == watchdog.rank:
            return  # all others have finished
        beat = watchdog._read_beat(self.rank)
        if beat is not None and beat.finished:
            self.rank = (self.rank + 1) % watchdog.world_size
            self.silence = Silence(watchdog.timeout_s, watchdog.interval_s)
        elif self.silence.lasts(None if beat is None else beat.count):
            never = f"rank {self.rank} did not start within {watchdog.timeout_s:g} s"
            watchdog._report(never if beat is None else beat.describe_lost(self.rank))
