"""Crash and hang detection: ranks watch each other through a board, and name who failed in which operation.

Each rank publishes a heartbeat and watches its right neighbour's, so the load of the board (`board.py`) per rank and
second is constant; rank 0 reads all of them now and then, to see whether any rank goes on. The first rank to notice a
failure writes a report; all others read it and exit with it, even in the middle of a collective, which nothing but the
end of the process can interrupt.

Time is counted in ticks of the watching rank: a process that was suspended, alone or with all others, does not mistake
its own absence for its neighbour's.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infini_train import exit_codes
from infini_train.resilience.board import Beat, Board, open_board
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


class Watchdog:
    """Inside the context, a rank that dies, hangs or fails ends all ranks, with a line that names rank and operation.

    A failure noticed while this rank is blocked ends the process at once with exit code 1. An exception that leaves the
    context is reported to the other ranks; a RuntimeError that another rank caused becomes a `LostRankError`. Rank 0
    waits at the end until all others have left, since the board may live in its process. With one rank it does nothing.

    Args:
        rank: this process.
        world_size: number of processes; the environment says where they meet (`parallel/meeting.py`).
        timeout_s: longest time without a heartbeat of a rank, and longest time in which no rank begins an operation.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.interval_s = min(MAX_INTERVAL_S, timeout_s / 10)
        self.operation = "start"
        self._operations = 0
        self._place = f"{socket.gethostname()}, process {os.getpid()}"
        self._board: Board | None = None
        self._failure = ""  # the report as it was read, in case the board is lost too
        self._is_warned = False
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
            self._board = open_board(2 * self.timeout_s)  # rank 0 may take long to come
            self._pulse_thread = threading.Thread(target=self._pulse, name="watch pulse", daemon=True)
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
        if self.rank == 0 and self.board.hosted_by_rank_0:
            self._wait_until_heard()  # it ends with this process
        self._left.set()
        self._wake.set()
        for thread in (self._pulse_thread, self._guard_thread):  # coming back into a dying interpreter would crash it
            thread.join(LEAVE_S)
        self._close_stacks()
        if lost is not None:
            raise LostRankError(lost) from error

    @property
    def board(self) -> Board:
        assert self._board is not None
        return self._board

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
        text = " ".join(str(error).split())[:MAX_TEXT]
        own = f"rank {self.rank} ({self._place}) failed in '{self.operation}': {type(error).__name__}: {text}"
        try:
            cause = self._await_report() if isinstance(error, RuntimeError) else None
            if cause is None:
                self.board.report(own)
                return None
        except RuntimeError:
            cause = self._failure or f"{self.board.place} is gone"
        return f"rank {self.rank}: '{self.operation}' failed because {cause} ({text})"

    def _wait_until_heard(self) -> None:
        deadline = time.monotonic() + LEAVE_S
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and self.board.count_heard() < self.world_size:
                time.sleep(self.interval_s / 4)

    def _await_report(self) -> str | None:
        """What the others find within `SETTLE_S`; otherwise a rank whose heartbeat has stopped."""
        first = self._read_beats()
        deadline = time.monotonic() + max(SETTLE_S, 4 * self.interval_s)
        while time.monotonic() < deadline:
            if report := self.board.read_report():
                return report
            time.sleep(self.interval_s / 2)
        for rank, (before, now) in enumerate(zip(first, self._read_beats(), strict=True)):
            if rank != self.rank and before is not None and before == now and not now.finished:
                return self.board.report(now.describe_lost(rank))
        return None

    # --------------------------------------------------------------------------------------------------------- threads

    def _pulse(self) -> None:
        """Publishes heartbeats and checks the others until this rank leaves."""
        neighbour, progress = Neighbour(self), Progress(self)
        try:
            while not (self._failing.is_set() and self._left.is_set()):
                finished = self._finished.is_set()
                operations = self._operations + (self._ticks if self.operation == OPENING else 0)
                self.board.publish(Beat(self._ticks, operations, self.operation, finished, self._place))
                if report := self.board.read_report():
                    self._failure = report
                    self.board.hear()
                    return self._end(f"{report}; this rank was in '{self.operation}'")
                if finished and (self.rank != 0 or self._have_all_finished()):
                    return None
                has_reported = neighbour.check() or progress.check()
                self._ticks += 1
                if not has_reported:  # otherwise this rank reads its report at once, as soon as the others
                    self._wake.wait(self.interval_s)
                self._wake.clear()
        except RuntimeError as error:
            text = " ".join(str(error).split())[:MAX_TEXT]
            return self._end(f"{self.board.place} is gone; this rank was in '{self.operation}' ({text})")

    def _guard(self) -> None:
        """Ends this rank if the pulse thread hangs: a request to a suspended store has no timeout of its own."""
        silence = Silence(self.timeout_s + 2 * self.interval_s, self.interval_s)
        while not self._left.wait(self.interval_s):
            if silence.lasts(self._ticks):
                seconds = f"for {self.timeout_s:g} s"
                self._end(f"{self.board.place} did not answer {seconds}; this rank was in '{self.operation}'")
                return

    def _end(self, message: str) -> None:
        """Ends the process wherever its main thread is, unless that is about to exit with an error of its own.

        Writes past `logging`, whose locks the main thread may hold.
        """
        self._one_end.acquire()
        if self._stacks and not self._failing.is_set():  # at once: the first rank that ends breaks the others' waits
            with contextlib.suppress(OSError, ValueError):  # the disk is full, or the main thread has closed it
                self._stacks.dump()
        if self._failing.wait(1.0) and self._left.wait(LEAVE_S):
            return
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame, STACK_LINES)) if frame else ""
        sys.stderr.write(f"rank {self.rank} was here:\n{stack}error: {message}\n")
        sys.stderr.flush()
        os._exit(exit_codes.FAILED)

    def _close_stacks(self) -> None:
        if self._stacks:
            with contextlib.suppress(OSError):
                self._stacks.close()

    # ----------------------------------------------------------------------------------------------------------- board

    def read_beat(self, rank: int) -> tuple[Beat | None, bool]:
        """See `Board.read`; a heartbeat that somebody else has overwritten is told once."""
        beat, is_foreign = self.board.read(rank)
        if is_foreign and not self._is_warned:
            self._is_warned = True
            LOG.warning(
                "warning: rank %d's heartbeat was overwritten by something that is not a rank of this run", rank
            )
        return beat, is_foreign

    def _read_beats(self) -> list[Beat | None]:
        return [self.read_beat(rank)[0] for rank in range(self.world_size)]

    def _have_all_finished(self) -> bool:
        return all(beat is not None and beat.finished for beat in self._read_beats())

    def describe_all(self) -> str:
        """Each rank's operation, grouped; first the few ranks that the others wait for."""
        ranks: dict[str, list[int]] = {}
        for rank, beat in enumerate(self._read_beats()):
            ranks.setdefault(beat.operation if beat else "not started", []).append(rank)
        groups = sorted(ranks.items(), key=lambda item: len(item[1]))
        lines = [f"rank {', '.join(map(str, found))} in '{name}'" for name, found in groups]
        if len(groups) > 1 and len(groups[0][1]) < len(groups[1][1]):
            lines[0] = f"the others seem to wait for {lines[0]}"
        return "; ".join(lines)


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

    def check(self) -> bool:
        """Reads its heartbeat; whether it reported the rank, because that has stopped."""
        watchdog = self.watchdog
        if self.rank == watchdog.rank:
            return False  # all others have finished
        beat, is_foreign = watchdog.read_beat(self.rank)
        if beat is not None and beat.finished:
            self.rank = (self.rank + 1) % watchdog.world_size
            self.silence = Silence(watchdog.timeout_s, watchdog.interval_s)
        elif is_foreign:  # says nothing about the rank
            self.silence = Silence(watchdog.timeout_s, watchdog.interval_s)
        elif self.silence.lasts(None if beat is None else beat.count):
            never = f"rank {self.rank} did not start within {watchdog.timeout_s:g} s"
            watchdog.board.report(never if beat is None else beat.describe_lost(self.rank))
            return True
        return False


class Progress:
    """Whether any rank goes on; rank 0 sees to it."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog, self.period_s = watchdog, max(watchdog.interval_s, watchdog.timeout_s / 16)
        # dead ranks are reported first
        self.silence = Silence(watchdog.timeout_s + 4 * watchdog.interval_s, self.period_s)

    def check(self) -> bool:
        """Reads all heartbeats once in a period; whether it reported that none has begun an operation for too long."""
        watchdog = self.watchdog
        if watchdog.rank != 0 or time.monotonic() < self.silence.checked + self.period_s:
            return False
        found = [watchdog.read_beat(rank) for rank in range(watchdog.world_size)]
        if any(is_foreign for _, is_foreign in found):
            self.silence = Silence(self.silence.limit_s, self.period_s)
        elif self.silence.lasts([None if beat is None else beat.operations for beat, _ in found]):
            watchdog.board.report(f"no rank went on for {watchdog.timeout_s:g} s; {watchdog.describe_all()}")
            return True
        return False
