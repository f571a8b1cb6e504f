"""Child processes that don't outlive their parent, however it dies. Imports no torch.

The kernel kills a child when the thread that started it ends: start children in a thread that lives as long as the
process. Everything that this project starts for longer than a moment goes through `end_with_parent`.
"""

import ctypes
import functools
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from infini_train import exit_codes

SAVING = "saving after this step"  # what a rank of a run says to a stop signal
PR_SET_PDEATHSIG = 1  # of prctl(2)
LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may be


def end_with_parent(parent: int) -> None:
    """Called in a child: it is killed when its parent ends, and ends at once if the parent, whose id is given, has."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(exit_codes.FAILED)


def ending_with_parent() -> Callable[[], None]:
    """The same as a `preexec_fn` of `subprocess.Popen`, for children of this process."""
    return functools.partial(end_with_parent, os.getpid())


def stop_signals() -> tuple[int, ...]:
    """The signals that ask a command to stop and save, less a SIGHUP that is ignored already: nohup stays nohup."""
    return tuple(
        number
        for number in exit_codes.STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    )


def run_child(
    command: Sequence[str], *, capture: bool = False, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Runs a command on this console to its end, and passes each signal that asks to stop on to it, once.

    The command has a process group of its own, so that Ctrl-C and Ctrl-Z in a terminal reach it through this process
    only. Must be called in the main thread.

    Args:
        command: program and arguments.
        capture: return what it prints instead of showing it.
        environment: None: this process's.

    Returns:
        The exit code as a shell has it, and what was printed.
    """
    early: list[int] = []  # signals from before the child was there
    child: subprocess.Popen[str] | None = None

    def forward(number: int, _: object) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    def suspend(*_: object) -> None:
        if child is not None:
            os.killpg(child.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if child is not None:
            os.killpg(child.pid, signal.SIGCONT)

    before = {number: signal.signal(number, forward) for number in stop_signals()}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, suspend)
    try:
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            text=True,
            process_group=0,
            preexec_fn=ending_with_parent(),
        ) as child:
            for number in early:
                child.send_signal(number)
            printed, _ = child.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return exit_codes.of_process(child.returncode), printed or ""
