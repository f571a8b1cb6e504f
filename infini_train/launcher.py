"""`--nproc N`: starts N ranks on this machine; handles their output, their signals and how they exit.

Plain processes with torchrun's environment instead of torch's elastic agent. The agent kills ranks 30 s after it asked
them to stop (saving a large checkpoint takes longer), leaves them in the terminal's process group (Ctrl-C reaches them
twice), shows their output late, and adds reports of its own.

The ranks meet in two files without names that they inherit from this process (memfd; `parallel/meeting.py`,
`resilience/board.py`): no port is opened for it, nobody else can reach them, and nothing is left of them, however the
processes end. Imports no torch.
"""

import math
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

from infini_train import exit_codes
from infini_train.child_processes import SAVING, ending_with_parent, stop_signals
from infini_train.environment import BOARD_FD, STORE_FD

GRACE_S = 5.0  # from SIGTERM to SIGKILL after a failure: the other ranks hang in collectives that never finish
STACKS_S = 0.5  # for a rank to dump its stacks before it is killed
HOLD_S = 5.0  # the lines of an error are held back this long, to be shown last if the rank exits with it
FINAL_ERROR = re.compile(rb"(  \+ Exception Group )?Traceback \(most recent call last\):|error: |Fatal Python error: ")
TORCH_PREFIX = re.compile(rb"^\[rank\d+\]: ")  # torch marks the lines of an uncaught exception
NOT_SAVING = b"another rank died; ending without a checkpoint\n"  # a checkpoint needs all ranks
LINES = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)")


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Runs `infini-train ARGUMENTS` in `nproc` ranks of this machine; returns the exit code (see `Ranks.wait`)."""
    with Ranks(nproc, rank_command(arguments)) as ranks:
        return ranks.wait()


def rank_command(arguments: Sequence[str]) -> list[str]:
    """What a rank of `infini-train ARGUMENTS` runs."""
    return [sys.executable, "-m", "infini_train.cli", *arguments]


def rank_environment(rank: int, nproc: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that torch.distributed reads, and settings that the user's environment may override."""
    return {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",  # a stack trace for a segfault
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **environment,
        "PYTHONUNBUFFERED": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
    }


@dataclass(eq=False)
class Rank:
    """One process.

    Attributes:
        block: lines of an error that may be its final one.
        ended: whether this launcher terminated it.
    """

    number: int
    process: subprocess.Popen[bytes]
    block: list[bytes] = field(default_factory=list)
    block_since: float = 0.0
    ended: bool = False

    @property
    def exit_code(self) -> int:
        """As a shell reports it; a rank that was terminated after an error of its own counts as failed."""
        code = self.process.returncode
        return exit_codes.FAILED if code < 0 and self.ended else exit_codes.of_process(code)

    def describe_end(self) -> str:
        """How it failed, as an error message."""
        number = -self.process.returncode
        if number <= 0 or self.ended:
            return f"rank {self.number} failed (exit code {self.exit_code})"
        name = {int(known): known.name for known in signal.Signals}.get(number, f"signal {number}")
        return f"rank {self.number} was killed by {name}"

    def show(self, lines: Sequence[bytes], *, error: bool) -> None:
        """Writes lines of its output to this process's console, after its rank."""
        stream = sys.stderr if error else sys.stdout
        prefix = b"[rank %d] " % self.number if self.number else b""
        try:
            stream.buffer.write(b"".join(prefix + line for line in lines))
            stream.flush()
        except OSError:  # the pipe or terminal was closed: the ranks go on
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Ranks:
    """The processes of one launch; none is left when the context ends. Must be used in the main thread (signals).

    Each rank has its own process group: signals of the terminal reach this process only, which forwards them once.
    The kernel kills the ranks if this process dies.
    """

    def __init__(self, nproc: int, command: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
        self.nproc, self.command, self.environment = nproc, list(command), environment
        self.ranks: list[Rank] = []
        self.running: list[Rank] = []
        self.troubled: list[Rank] = []  # in the order of detection: the first that fails is the cause
        self.forwarded = 0  # the signal that was forwarded
        self.insisted = False  # there was a second Ctrl-C
        self.kill_at = math.inf
        self._unfinished: dict[Any, bytes] = {}  # start of an incomplete line, by open stream
        self._handlers: dict[int, Any] = {}
        self._files: dict[str, int] = {}  # in which the ranks meet, by the variable that says which

    def __enter__(self) -> Self:
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._read_signals)
        self._previous_fd = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (*stop_signals(), signal.SIGTSTP, signal.SIGCHLD):
            self._handlers[number] = signal.signal(number, lambda *_: None)  # the wakeup fd delivers it
        try:
            for name in (STORE_FD, BOARD_FD):
                self._files[name] = os.memfd_create(name)
            for number in range(self.nproc):
                self._start(number)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()
        for rank in self.ranks:
            rank.process.wait()
            for stream in (rank.process.stdout, rank.process.stderr):
                assert stream is not None
                stream.close()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for resource in (self._selector, self._wakeup, self._waker):
            resource.close()
        for descriptor in self._files.values():
            os.close(descriptor)

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether a signal asked this process to end: whatever becomes of the ranks, they are not started again."""
        return self.forwarded > 0 or self.insisted

    def wait(self) -> int:
        """Shows the ranks' output until all have ended, and the first failure last.

        Returns:
            0; the code of the rank that failed first (128 + number if a signal killed it); 128 + a forwarded signal.
        """
        while self.running:
            ready = [key.data for key, _ in self._selector.select(0.5)]
            ended = [rank for rank in self.running if rank.process.poll() is not None]
            for rank in ended:  # before any output: neighbours of a killed rank report errors at once
                if rank.process.returncode < 0 and not rank.ended:
                    self._note_trouble(rank)
            for read in ready:
                read()
            for rank in ended:
                self._handle_exit(rank)
            now = time.monotonic()
            for rank in self.running:
                if rank.block and now > rank.block_since + HOLD_S and self.kill_at == math.inf:
                    self._release(rank)  # still running: the error was not final
            if now > self.kill_at:
                self._request_stacks()
                self._kill()
        return self._report()

    def _start(self, number: int) -> None:
        files = {name: str(descriptor) for name, descriptor in self._files.items()}
        process = subprocess.Popen(
            self.command,
            env={**rank_environment(number, self.nproc, self.environment), **files},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=tuple(self._files.values()),
            process_group=0,
            preexec_fn=ending_with_parent(),
        )
        rank = Rank(number, process)
        self.ranks.append(rank)
        self.running.append(rank)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            self._unfinished[stream] = b""
            self._selector.register(stream, selectors.EVENT_READ, partial(self._read, rank, stream))

    # ------------------------------------------------------------------------------------------------------- signals

    def _read_signals(self) -> None:
        for number in self._wakeup.recv(4096):
            if number in exit_codes.STOP_SIGNALS:
                self._forward(number)
            elif number == signal.SIGTSTP:  # Ctrl-Z
                self._send(signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
                self._send(signal.SIGCONT)

    def _forward(self, number: int) -> None:
        if number == signal.SIGINT and (self.forwarded or self.kill_at < math.inf):
            self.insisted = True
            self._kill()
        elif not self.forwarded:
            self.forwarded = number
            self._send(number)

    def _send(self, number: int) -> None:
        for rank in self.running:
            rank.process.send_signal(number)

    def _kill(self) -> None:
        for rank in self.running:
            if rank.process.poll() is None:
                rank.ended = True
                os.killpg(rank.process.pid, signal.SIGKILL)

    def _request_stacks(self) -> None:
        """Has hanging ranks dump their stacks (`resilience/stack_dumps.py`), suspended ones after resuming them."""
        for number in (signal.SIGURG, signal.SIGCONT):
            self._send(number)
        time.sleep(STACKS_S)

    def _end_others(self) -> None:
        """Terminates the ranks, except those about to exit with an error of their own."""
        if self.kill_at == math.inf:
            self.kill_at = time.monotonic() + GRACE_S
            for rank in self.running:
                if not rank.block:
                    rank.ended = True
                    rank.process.terminate()

    # ----------------------------------------------------------------------------------------------------- their output

    def _read(self, rank: Rank, stream: Any) -> bool:
        """Reads what is there and shows complete lines, so that lines of ranks don't mix; False: no more for now."""
        try:
            data = os.read(stream.fileno(), 1 << 20)
        except BlockingIOError:
            return False
        text = self._unfinished[stream] + data
        if not data:
            self._selector.unregister(stream)
            del self._unfinished[stream]
            text += b"\n" if text else b""
        else:
            self._unfinished[stream] = LINES.sub(b"", text)
        for line in LINES.findall(text):
            words = TORCH_PREFIX.sub(b"", line)
            error = stream is rank.process.stderr
            if error and (rank.block or FINAL_ERROR.match(words)):
                if not rank.block:
                    rank.block_since = time.monotonic()
                    self._note_trouble(rank)
                rank.block.append(words)
            else:
                not_saving = error and rank.ended and line.rstrip().endswith(SAVING.encode())
                rank.show([NOT_SAVING if not_saving else line], error=error)
        return bool(data)

    def _release(self, rank: Rank) -> None:
        rank.show(rank.block, error=True)
        rank.block.clear()
        self.troubled.remove(rank)

    def _note_trouble(self, rank: Rank) -> None:
        if rank not in self.troubled:
            self.troubled.append(rank)

    # ------------------------------------------------------------------------------------------------------ their exits

    def _handle_exit(self, rank: Rank) -> None:
        """Determines how a rank has ended; a failure terminates the others."""
        self.running.remove(rank)
        for stream in (rank.process.stdout, rank.process.stderr):
            while stream in self._unfinished and self._read(rank, stream):
                pass
        if rank.process.returncode == exit_codes.DONE:
            if rank.block:
                self._release(rank)
        elif not self._has_stopped(rank):
            self._note_trouble(rank)
            self._end_others()
        elif rank.process.returncode < 0:
            self._end_others()  # it could not save, so the others can't complete a checkpoint

    def _has_stopped(self, rank: Rank) -> bool:
        """Whether a signal asked it to stop: a forwarded one, or one sent to the rank itself."""
        code = rank.process.returncode
        return code in exit_codes.STOPPED or (self.forwarded > 0 and code == -self.forwarded)

    def _report(self) -> int:
        """Shows the errors held back, each once, the first failure's last; returns the exit code."""
        stops = [rank for rank in self.troubled if self.insisted or self._has_stopped(rank)]
        failed = [rank for rank in self.troubled if rank not in stops and (rank.block or not rank.ended)]
        last = failed[0] if failed else None
        shown = [last.block] if last else []
        for rank in (*stops, *failed):
            if rank.block and rank.block not in shown:
                rank.show(rank.block, error=True)
                shown.append(rank.block)
        if last is None:
            stopped = [rank.process.returncode for rank in self.ranks if self._has_stopped(rank)]
            asked = self.forwarded or (signal.SIGINT if self.insisted else 0)
            if asked and (self.insisted or stopped):
                return exit_codes.of_signal(asked)
            return max(stopped, default=exit_codes.DONE)
        has_message = last.block and last.block[0].startswith(b"error: ")
        heading = [] if has_message else [f"error: {last.describe_end()}\n".encode()]
        sys.stderr.buffer.write(b"".join([*heading, *last.block]))
        sys.stderr.flush()
        return last.exit_code
