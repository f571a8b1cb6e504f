"""The tasks of a plan on all cores: each is done whole or not at all, and a later run does those that are missing.

A task writes into a folder of its own, which gets its name by one rename when all of it is on the disk. Worker
processes get task numbers over pipes; a broken pipe shows each side that the other has died.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data_tools.plan import Plan
from data_tools.problems import SettingError
from data_tools.progress import byte_bar
from data_tools.task_files import list_files
from infini_train import exit_codes
from infini_train.atomic_files import sync_path
from infini_train.child_processes import end_with_parent
from infini_train.command_errors import translate
from infini_train.config.errors import ConfigError
from infini_train.data.writer import explain_disk_errors

# Called with the number of a task, the empty folder to write into, the number of threads, and a function to call with
# the source bytes that were read.
Work = Callable[[int, Path, int, Callable[[int], None]], None]

_REPORT_BYTES = 1_000_000  # a worker reports its progress each time it has read this many


def finished_tasks(folder: Path) -> set[int]:
    """The numbers of the tasks whose folders are there."""
    names = (path.name for path in folder.iterdir())
    return {int(name.removeprefix("task-")) for name in names if name.startswith("task-")}


def task_folder(folder: Path, task: int) -> Path:
    """Where a finished task lies."""
    return folder / f"task-{task:06d}"


def share(part: str | None, tasks: int) -> range:
    """The tasks of part I of N, written I/N with I from 1; all without a part.

    Raises:
        SettingError: it is not such a part.
    """
    if part is None:
        return range(tasks)
    first, _, number = part.partition("/")
    if not (first.isdecimal() and number.isdecimal() and 1 <= int(first) <= int(number)):
        raise SettingError("{part}: {given} is not I/N with I from 1 to N, as in 3/8", given=repr(part))
    return range(int(first) - 1, tasks, int(number))


def run_tasks(folder: Path, plan: Plan, work: Work, *, workers: int, part: str | None = None, label: str = "") -> None:
    """Do the tasks of the plan (or of a part of it) that are not yet done.

    Raises:
        ConfigError: a task failed, or its process was killed. What was finished stays.
    """
    finished, mine = finished_tasks(folder), share(part, len(plan))
    missing = [task for task in mine if task not in finished]
    done_bytes = sum(int(plan.sizes[task]) for task in mine if task in finished)
    total = sum(int(plan.sizes[task]) for task in mine)
    with byte_bar(label, total, done_bytes) as advance:
        if plan.in_process or min(workers, len(missing)) <= 1:
            for task in missing:
                do_task(folder, work, task, workers, advance)
        else:
            _Pool(folder, work, min(workers, len(missing))).run(missing, advance)


def do_task(folder: Path, work: Work, task: int, threads: int, advance: Callable[[int], None]) -> None:
    """One task: aside, then renamed."""
    target = task_folder(folder, task)
    for stale in folder.glob(f".{target.name}.*"):  # of a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    aside = folder / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        with explain_disk_errors(folder):
            aside.mkdir()
            work(task, aside, threads, advance)
            list_files(aside)
            for path in (*aside.iterdir(), aside):
                sync_path(path)
            try:
                aside.rename(target)
            except OSError:
                if not target.exists():  # a worker whose parent was killed may have finished it just now
                    raise
            sync_path(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Pool:
    """Worker processes, each with a pipe: task numbers go in; bytes read come out, then None or an error."""

    def __init__(self, folder: Path, work: Work, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection[Any, Any], Any] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_start, args=(os.getpid(), theirs, folder, work), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, tasks: list[int], advance: Callable[[int], None]) -> None:
        waiting = iter(tasks)
        try:
            for connection in list(self._processes):
                self._give(connection, waiting)
            while self._processes:
                for ready in wait(list(self._processes)):
                    self._take(ready, waiting, advance)  # type: ignore[arg-type]
        finally:
            for process in self._processes.values():
                process.terminate()
            for process in self._processes.values():
                process.join()

    def _take(self, ready: "Connection[Any, Any]", waiting: Iterator[int], advance: Callable[[int], None]) -> None:
        try:
            message = ready.recv()
        except (EOFError, OSError):
            process = self._processes[ready]
            process.join()
            raise ConfigError(_explain_death(process.exitcode)) from None
        if isinstance(message, int):
            advance(message)
        elif message is None:
            self._give(ready, waiting)
        else:
            raise message

    def _give(self, connection: "Connection[Any, Any]", waiting: Iterator[int]) -> None:
        """The next task, or the end."""
        task = next(waiting, None)
        with contextlib.suppress(BrokenPipeError):  # it has died, which shows where its answer is awaited
            connection.send(task)
        if task is None:
            process = self._processes.pop(connection)
            connection.close()
            process.join()


def _explain_death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ": perhaps memory ran out; run fewer workers" if name == "SIGKILL" else ""
        return f"a worker process was ended by {name}{hint}; rerun the command to resume"
    return f"a worker process ended with status {code}; rerun the command to resume"


def _start(parent: int, connection: "Connection[Any, Any]", folder: Path, work: Work) -> None:
    """A worker's process. If it outlived its parent, it could meet the next run's workers at the same task."""
    end_with_parent(parent)
    # the parent gives up: what lies aside is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exit_codes.TERMINATED))
    _serve(connection, folder, work)


def _serve(connection: "Connection[Any, Any]", folder: Path, work: Work) -> None:
    """A worker's main loop. Ctrl-C reaches the whole group of processes: the parent deals with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    unreported = 0

    def advance(n_bytes: int) -> None:
        nonlocal unreported
        unreported += n_bytes
        if unreported >= _REPORT_BYTES:
            try:
                connection.send(unreported)
            except OSError:  # the parent has died; to a reader this would look like a broken file
                sys.exit(exit_codes.FAILED)
            unreported = 0

    try:
        while (task := connection.recv()) is not None:
            try:
                do_task(folder, work, task, 1, advance)
                connection.send(None)
            except ConfigError as error:
                connection.send(error)
            except Exception as error:
                if (message := translate(error)) is None:
                    raise
                connection.send(ConfigError(message))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(exit_codes.FAILED)  # the parent has died
