"""Who died, who hangs, and in which operation: ranks that watch each other through torch's store.

Each rank publishes a heartbeat and watches that of its right neighbour: the store's work a rank and second is constant.
The first who notices something writes an obituary; all others read it and end with it, also in the middle of a
collective, which nothing but the end of the process can interrupt.

Time is counted in ticks of the watcher: a process that was stopped for a while, with all others or alone, doesn't take
its own absence for that of its neighbour.
"""

import contextlib
import json
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

from infini_train.parallel.diary import Diary
from infini_train.parallel.stacks import Stacks, logs_folder

MAX_INTERVAL_S = 0.5
MAX_TEXT = 200
SETTLE_S = 2.0  # after a lost connection: this long without a heartbeat is taken for death
LEAVE_S = 3.0  # a rank that has an error of its own gets this long to end by it
STACK_LINES = 6
OPENING = "opening the run"  # checkpoints are hashed and read, however long that takes: only a death ends it


class LostRankError(RuntimeError):
    """An operation failed because of another rank; one line that names both."""


class Beat(NamedTuple):
    """What a rank says of itself."""

    count: int
    operation: str
    finished: bool
    place: str  # "host, process 123"


class Watch:
    """Inside the context a rank that dies, hangs or fails ends all ranks, with a line that says which and where.

    What it notices while this rank is blocked ends the process with code 1 at once. If an exception leaves the context,
    the others are told; a RuntimeError that another rank caused becomes a `LostRankError`. Rank 0 waits at the end
    until all others have left, since the store may live in its process. Nothing is done for one rank.

    Args:
        rank: this process.
        world_size: number of processes; MASTER_ADDR and MASTER_PORT say where their store is (torchrun's, or rank 0's).
        timeout_s: longest silence of a rank, and longest time in which no rank begins another operation.
        name: of this watch in the store, where another one has been before it.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, name: str = "train") -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.interval_s = min(MAX_INTERVAL_S, timeout_s / 10)
        self.operation = "start"
        self._operations = 0
        self._prefix = f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
        self._place = f"{socket.gethostname()}, process {os.getpid()}"
        self._store: PrefixStore | None = None
        self._obituary = ""  # as it was read, in case that the store goes too
        self._ticks = 0
        self._wake = threading.Event()
        self._finished = threading.Event()  # the context was left without an error
        self._failing = threading.Event()  # the main thread has an error, and ends by it
        self._left = threading.Event()  # the main thread has come out of the context
        self._one_end = threading.Lock()  # of the two threads that may end the process
        self._pulse_thread: threading.Thread | None = None
        self._diary: Diary | None = None
        self._stacks: Stacks | None = None

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
        if self._diary:
            self._diary.close(LEAVE_S)
        if error is None:
            self.doing("wait for the other ranks at the end")
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

    def doing(self, operation: str) -> None:
        """Names what this rank does from now on; costs nothing, so call it for each part of a step."""
        self.operation = operation
        self._operations += 1

    def took(self, own_s: float, step_s: float) -> None:
        """How long a step was, and of it what this rank did alone, which no other rank can hold up."""
        if self._diary:
            self._diary.pace.append((own_s, step_s))

    def keep_diary(self, run_dir: Path) -> None:
        """From now on each rank writes there what it does, now and then, and in a hang its stacks."""
        if self.world_size > 1:
            folder = run_dir / "launch" / "ranks"
            self._diary = Diary(folder, self.rank, self.world_size, self._place, self.timeout_s / 4)
            self._diary.start(lambda: (self._operations, self.operation))
            with contextlib.suppress(OSError):
                self._stacks = Stacks(logs_folder(run_dir), self.rank)

    # -------------------------------------------------------------------------------------------------- the own error

    def _find_cause(self, error: BaseException) -> str | None:
        """Another rank's fault, as one line; None: this rank's own error, which the others are now told."""
        deadline = time.monotonic() + LEAVE_S
        while self._store is None and time.monotonic() < deadline:  # the pulse is still connecting
            time.sleep(self.interval_s / 4)
        text = " ".join(str(error).split())[:MAX_TEXT]
        told = f"rank {self.rank} ({self._place}) failed in '{self.operation}': {type(error).__name__}: {text}"
        try:
            obituary = self._await_obituary() if isinstance(error, RuntimeError) and self._store else None
            if obituary is None:
                if self._store is not None:
                    self._write_obituary(told)
                return None
        except RuntimeError:
            obituary = self._obituary or f"{describe_store()} is gone"
        return f"rank {self.rank}: '{self.operation}' failed because {obituary} ({text})"

    def _wait_until_heard(self) -> None:
        deadline = time.monotonic() + LEAVE_S
        with contextlib.suppress(RuntimeError):
            while self._store and time.monotonic() < deadline and self._store.add("heard", 0) < self.world_size:
                time.sleep(self.interval_s / 4)

    def _await_obituary(self) -> str | None:
        """What the others have found, or find within `SETTLE_S`; else a rank whose heart does not beat any more."""
        first = self._read_beats()
        deadline = time.monotonic() + max(SETTLE_S, 4 * self.interval_s)
        while time.monotonic() < deadline:
            if obituary := self._read("obituary").decode():
                return obituary
            time.sleep(self.interval_s / 2)
        for rank, (before, now) in enumerate(zip(first, self._read_beats(), strict=True)):
            if rank != self.rank and before is not None and before == now and not now.finished:
                return self._write_obituary(
                    f"rank {rank} ({now.place}) stopped answering; last heard of in '{now.operation}'"
                )
        return None

    # --------------------------------------------------------------------------------------------------------- threads

    def _pulse(self, host: str, port: int) -> None:
        """Beats, and looks after the others, until this rank leaves."""
        progress = Silence(self.timeout_s + 4 * self.interval_s, self.interval_s)  # deaths are told first
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
                if obituary := self._read("obituary").decode():
                    self._obituary = obituary
                    self._store.add("heard", 1)
                    return self._end(f"{obituary}; this rank was in '{self.operation}'")
                if finished and (self.rank != 0 or self._have_all_finished()):
                    return None
                neighbour.look()
                if progress.lasts(self._store.add("operations", int(operations != published))):
                    self._write_obituary(f"no rank went on for {self.timeout_s:g} s; {self._describe_all()}")
                published = operations
                self._ticks += 1
                self._wake.wait(self.interval_s)
                self._wake.clear()
        except RuntimeError as error:
            text = " ".join(str(error).split())[:MAX_TEXT]
            return self._end(f"{describe_store()} is gone; this rank was in '{self.operation}' ({text})")

    def _guard(self) -> None:
        """Ends this rank if the pulse hangs: a request to a stopped store has no timeout of its own."""
        silence = Silence(self.timeout_s + 2 * self.interval_s, self.interval_s)
        while not self._left.wait(self.interval_s):
            if silence.lasts(self._ticks):
                seconds = f"for {self.timeout_s:g} s"
                self._end(f"{describe_store()} did not answer {seconds}; this rank was in '{self.operation}'")
                return

    def _end(self, message: str) -> None:
        """Ends the process wherever its main thread is, unless that comes with an error of its own and leaves."""
        self._one_end.acquire()
        if self._failing.wait(1.0) and self._left.wait(LEAVE_S):
            return
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame, STACK_LINES)) if frame else ""
        if self._stacks:
            with contextlib.suppress(OSError, ValueError):  # a full disk; closed by the main thread
                self._stacks.dump()
        sys.stderr.write(f"rank {self.rank} was here:\n{stack}error: {message}\n")
        sys.stderr.flush()
        os._exit(1)

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
        """None: that rank has said nothing yet."""
        text = self._read(f"beat/{rank}")
        return Beat(*json.loads(text)) if text else None

    def _read_beats(self) -> list[Beat | None]:
        return [self._read_beat(rank) for rank in range(self.world_size)]

    def _have_all_finished(self) -> bool:
        return all(beat is not None and beat.finished for beat in self._read_beats())

    def _write_obituary(self, text: str) -> str:
        """The first one stays; returns that."""
        assert self._store is not None
        return self._store.compare_set("obituary", "", text).decode()

    def _describe_all(self) -> str:
        """What each rank is doing, those with the same operation together; first the few that the others wait for."""
        ranks: dict[str, list[int]] = {}
        for rank, beat in enumerate(self._read_beats()):
            ranks.setdefault(beat.operation if beat else "not started", []).append(rank)
        groups = sorted(ranks.items(), key=lambda item: len(item[1]))
        told = [f"rank {', '.join(map(str, found))} in '{name}'" for name, found in groups]
        if len(groups) > 1 and len(groups[0][1]) < len(groups[1][1]):
            told[0] = f"the others seem to wait for {told[0]}"
        return "; ".join(told)


def is_agents_store() -> bool:
    """Whether the store lives in the launcher's process (torchrun, --nproc); otherwise in rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def describe_store() -> str:
    """Where it is."""
    return f"the store in {'the launcher' if is_agents_store() else 'rank 0'}'s process"


class Silence:
    """For how long a value has stayed the same, in the watcher's own time."""

    def __init__(self, limit_s: float, interval_s: float) -> None:
        self.limit_s, self.most_s = limit_s, 2 * interval_s  # a longer gap is an absence of the watcher
        self.value: Any = None
        self.lasted_s, self.looked = 0.0, time.monotonic()

    def lasts(self, value: Any) -> bool:
        """Whether the limit is reached with this value, which was found just now."""
        now = time.monotonic()
        self.lasted_s = self.lasted_s + min(now - self.looked, self.most_s) if value == self.value else 0.0
        self.value, self.looked = value, now
        return self.lasted_s >= self.limit_s


class Neighbour:
    """The next rank to the right that has not finished."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.rank = watch, (watch.rank + 1) % watch.world_size
        self.silence = Silence(watch.timeout_s, watch.interval_s)

    def look(self) -> None:
        """Reads its heartbeat; writes its obituary when the heart has stopped."""
        watch = self.watch
        if self.rank == watch.rank:
            return  # all others have finished
        beat = watch._read_beat(self.rank)
        if beat is not None and beat.finished:
            self.rank = (self.rank + 1) % watch.world_size
            self.silence = Silence(watch.timeout_s, watch.interval_s)
        elif self.silence.lasts(None if beat is None else beat.count):
            found = f"rank {self.rank} did not start within {watch.timeout_s:g} s"
            if beat is not None:
                found = f"rank {self.rank} ({beat.place}) stopped answering; last heard of in '{beat.operation}'"
            watch._write_obituary(found)
