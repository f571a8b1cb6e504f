"""Which part of the sources each task reads: a pure function of the files' names and sizes and of the task size.

The plan is written before any work begins. A later run of the same command plans again and compares: it resumes only if
nothing has changed. Memory stays constant, whatever the number of files.
"""

import filecmp
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.documents import FileRange
from data_tools.formats import FORMATS, compression_of, format_of
from data_tools.pipes import is_pipe
from data_tools.problems import SettingError
from data_tools.progress import elapsed_time, print_note
from data_tools.sources import find_files
from data_tools.storage import CTIME, SourceFile, differ_in_ctime, is_stream, require_unchanged
from infini_train.config.errors import ConfigError
from infini_train.data.sealed import parse_object
from infini_train.redaction import redact

_FILES, _TASKS, _COMMAND = "sources.jsonl", "tasks.jsonl", "command.json"
_MIN_TASK_BYTES = 8_000_000
_TASKS_WANTED = 64
_MAX_TASKS = 1_000_000  # each becomes a folder
_CHECKS_AT_ONCE, _CHECKED_BETWEEN = 16, 10_000  # sources: threads; files between two looks for errors
_TASK_RANGES = 10_000  # at most, since a task's list is held in memory


def task_bytes(total_bytes: int, largest: int) -> int:
    """Source bytes of a task: enough tasks for many workers, neither tiny nor larger than `largest`."""
    return max(1, min(largest, max(_MIN_TASK_BYTES, total_bytes // _TASKS_WANTED)))


def plan_tasks(files: Iterable[SourceFile], size: int, format: str | None = None) -> Iterator[list[FileRange]]:
    """The file ranges of each task, in the order of the files: about `size` bytes, more only for what can't be cut.

    Many small files make a smaller task. A pipe is a task of its own, since nobody knows what it will print.
    """
    task: list[FileRange] = []
    room = size
    for file in files:
        if is_pipe(file.path):
            if task:
                yield task
            yield [FileRange(file.path, file.id, file.source, 0, 0)]
            task, room = [], size
            continue
        kind = format or format_of(file.path)
        whole = compression_of(file.path) or kind is None or not FORMATS[kind].cuttable
        start = 0
        while start < file.bytes or not start:
            length = file.bytes if whole or not file.bytes else min(room, file.bytes - start)
            if task and length > room:
                yield task
                task, room = [], size
                continue
            stop = start + length
            task.append(FileRange(file.path, file.id, file.source, start, stop, file.bytes, file.version))
            start, room = start + max(length, 1), room - length
            if room <= 0 or len(task) == _TASK_RANGES:
                yield task
                task, room = [], size
    if task:
        yield task


class Plan:
    """The tasks of a command, as stored in its folder.

    Attributes:
        sizes: bytes of each task.
        in_process: a source can only be read once, and by this very process (standard input, a named pipe).
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _TASKS
        starts, sizes = [0], []
        self.in_process = False
        with self._path.open("rb") as file:
            for line in file:
                starts.append(starts[-1] + len(line))
                ranges = [FileRange(*row) for row in json.loads(line)]
                sizes.append(sum(each.stop - each.start for each in ranges))
                self.in_process |= any(not each.stop and is_stream(each.path) for each in ranges)
        self._starts, self.sizes = np.array(starts), np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    def ranges(self, task: int) -> list[FileRange]:
        """What a task reads."""
        with self._path.open("rb") as file:
            file.seek(int(self._starts[task]))
            return [FileRange(*row) for row in json.loads(file.readline())]


def make_plan(
    folder: Path, sources: list[str], command: Mapping[str, Any], largest: int, format: str | None = None
) -> Plan:
    """Write the plan into a folder, or check that it equals the one there.

    Args:
        folder: of unfinished work; it exists.
        sources: as in `find_files`.
        command: whatever else the results depend on, by the name of its setting; JSON values.
        largest: source bytes of a task, at most.
        format: of all files, if given.

    Raises:
        ConfigError: the sources can't be found, or would be cut into too many tasks.
        SettingError: the folder holds work of another command or of other sources.
    """
    aside = folder / f".plan-{uuid.uuid4().hex[:8]}"
    files, tasks, options = (aside.with_name(aside.name + suffix) for suffix in ("-files", "-tasks", "-command"))
    try:
        with elapsed_time("list the sources"):
            total = _write_lines(files, find_files(sources, print_note))
        tasks_of = plan_tasks(_read_files(files), task_bytes(total, largest), format)
        _write_lines(tasks, _limited(tasks_of))
        options.write_text(
            json.dumps({"sources": [redact(each) for each in sources], **command}, indent=1) + "\n", encoding="utf-8"
        )
        if (folder / _COMMAND).exists():
            _compare(folder, options, files, tasks)
        else:
            for path, name in ((files, _FILES), (tasks, _TASKS), (options, _COMMAND)):  # the last one makes it valid
                os.replace(path, folder / name)
    finally:
        for path in (files, tasks, options):
            path.unlink(missing_ok=True)
    return Plan(folder)


def _limited(tasks: Iterable[list[FileRange]]) -> Iterator[list[FileRange]]:
    for number, task in enumerate(tasks):
        if number == _MAX_TASKS:
            raise ConfigError(f"the sources would be cut into more than {_MAX_TASKS:,} tasks; ask for larger ones")
        yield task


def check_sources(folder: Path) -> None:
    """Checks that all files are still those that were planned.

    Raises:
        ConfigError: one has changed.
    """
    with elapsed_time("check the sources"):
        files = _read_files(folder / _FILES)
        with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:  # a store takes tens of milliseconds for each
            while some := list(islice(files, _CHECKED_BETWEEN)):
                for _ in pool.map(lambda file: require_unchanged(file.path, file.bytes, file.version), some):
                    pass


def _write_lines(path: Path, rows: Iterable[Any]) -> int:
    """A JSON line for each; the sum of the files' bytes. For the owner alone: a URL may hold a password."""
    total = 0
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as out:
        for row in rows:
            total += row.bytes if isinstance(row, SourceFile) else 0
            out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())
    return total


def _read_files(path: Path) -> Iterator[SourceFile]:
    with path.open("rb") as file:
        for line in file:
            try:
                yield SourceFile(*json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise SettingError("{path}: is damaged; pass {restart} to begin again", path=path) from None


def _compare(folder: Path, options: Path, files: Path, tasks: Path) -> None:
    """Raises unless the folder's plan is the same, its tasks included: what they name may be run as a command."""
    try:
        old, new = (parse_object(path.read_bytes()) for path in (folder / _COMMAND, options))
    except ValueError as error:
        template = "{path}: is damaged ({problem}); pass {restart} to begin again"
        raise SettingError(template, path=folder / _COMMAND, problem=error) from error
    end = "rerun the original command to resume it, or pass {restart} to begin again"
    for name in {**old, **new}:
        if name not in old or name not in new or old[name] != new[name]:
            # The sources are arguments, and the version belongs to no setting.
            is_setting = name in new and name != "sources" and " " not in name
            shown = f"{{{name}}}" if is_setting else "{changed}"
            template = f"{{folder}}: holds unfinished work of another command ({shown} differs); {end}"
            raise SettingError(template, folder=folder, changed=name)
    if filecmp.cmp(folder / _FILES, files, shallow=False):
        if filecmp.cmp(folder / _TASKS, tasks, shallow=False):
            return
        raise SettingError(f"{{path}}: is not the plan of these sources; {end}", path=folder / _TASKS)
    how = ""
    for before, now in zip(_read_files(folder / _FILES), _read_files(files), strict=False):
        if before != now:
            changed = before.path if before.path == now.path else f"{before.path} or {now.path}"
            if before.bytes == now.bytes and differ_in_ctime(before.path, before.version, now.version):
                how = f": {CTIME}"
            break
    else:
        changed = "the number of files"
    template = f"{{folder}}: holds unfinished work, but the sources have changed since ({{changed}}){how}; {end}"
    raise SettingError(template, folder=folder, changed=changed)
