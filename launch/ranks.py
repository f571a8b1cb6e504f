"""Finds silent, slow and stuck ranks from the files that each rank writes every 10 s."""

import contextlib
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from infini_train.regular_files import read_regular
from launch import folder

SILENT_S = 60.0  # a shared file system may show a new modification time half a minute late
SLOW = 1.5  # times the others' own work per step
MIN_DELAY = 0.1  # as a fraction of a step; less is not worth reporting
SHOWN = 4  # how many ranks are named


class Entry(NamedTuple):
    """A rank's last report."""

    rank: int
    place: str  # "host, process 123"
    operation: str
    for_s: float  # how long it had been in this operation when it wrote
    age_s: float  # age of the report
    own_s: float | None  # median over recent steps: data and forward, before waiting for gradients
    step_s: float | None  # the same for whole steps

    @property
    def node(self) -> str:
        return self.place.partition(",")[0]


def read_ranks(run_dir: Path) -> list[Entry]:
    """The ranks of the newest start; empty for a run of one process, or before training has begun."""
    found: dict[Entry, tuple[float, str, int]] = {}
    for path in (run_dir / "launch" / "ranks").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            values, written = json.loads(read_regular(path, folder.MAX_BYTES)), path.stat().st_mtime
            pace = (values.get(name) if folder.is_number(values.get(name)) else None for name in ("own_s", "step_s"))
            if not all(folder.is_number(values[name]) for name in ("for_s", "world_size")):
                continue
            texts = (folder.printable(str(values[name])) for name in ("place", "operation"))
            entry = Entry(int(path.stem), *texts, float(values["for_s"]), time.time() - written, *pace)
            found[entry] = written, str(values["start"]), int(values["world_size"])
    _, newest, world_size = max(found.values(), default=(0.0, "", 0))
    if newest and newest != folder.read_fence(run_dir):
        return []  # a start from which no rank has reported yet
    return sorted(entry for entry, (_, start, _) in found.items() if start == newest and entry.rank < world_size)


def describe_trouble(ranks: list[Entry]) -> str:
    """One line that names the ranks in trouble; empty if there are none."""
    silent = [entry for entry in ranks if entry.age_s > SILENT_S]
    if silent:
        longest = max(silent, key=lambda entry: entry.age_s)
        where = f"rank {longest.rank} ({longest.place}) for {longest.age_s:.0f} s, last in '{longest.operation}'"
        return f"{len(silent)} of {len(ranks)} ranks silent: {_numbers(silent)}; {where}"
    still_s = min((entry.for_s + entry.age_s for entry in ranks), default=0.0)
    return _describe_stillness(ranks, still_s) if still_s > SILENT_S else _describe_slowness(ranks)


def _describe_stillness(ranks: list[Entry], still_s: float) -> str:
    groups: dict[str, list[Entry]] = {}
    for entry in ranks:
        groups.setdefault(entry.operation, []).append(entry)
    rarest = sorted(groups.items(), key=lambda item: len(item[1]))  # the odd one out is often what all others wait for
    stuck = "; ".join(f"rank {_numbers(entries)} in '{operation}'" for operation, entries in rarest[:SHOWN])
    return f"no rank made progress for {still_s:.0f} s: {stuck}"


def _describe_slowness(ranks: list[Entry]) -> str:
    own_s = {entry: entry.own_s for entry in ranks if entry.own_s is not None and entry.step_s is not None}
    if len(own_s) < 2:
        return ""
    usual_s = statistics.median_low(own_s.values())
    slow = [
        entry
        for entry, seconds in own_s.items()
        if seconds > SLOW * usual_s and seconds - usual_s > MIN_DELAY * (entry.step_s or 0.0)
    ]
    if not slow:
        return ""
    slowest, nodes = max(own_s[entry] for entry in slow), sorted({entry.node for entry in slow})
    where = ", ".join(nodes[:SHOWN]) + (f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else "")
    return f"rank {_numbers(slow)} on {where} slow: {slowest:.3g} s of own work per step, the others {usual_s:.3g} s"


def _numbers(ranks: Iterable[Entry]) -> str:
    numbers = [str(entry.rank) for entry in ranks]
    return ", ".join(numbers[:SHOWN]) + (f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else "")
