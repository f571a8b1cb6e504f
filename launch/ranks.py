"""Which ranks of a run are silent, or where all stand still: from the files that each rank writes every 10 s."""

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from launch import folder

SILENT_S = 60.0  # shared file systems may show a file's new time half a minute late
SHOWN = 4  # ranks named, of many


class Entry(NamedTuple):
    """A rank's last word."""

    rank: int
    place: str  # "host, process 123"
    operation: str
    for_s: float  # it had been in this operation when it wrote
    age_s: float  # of what it wrote


def read_ranks(run_dir: Path) -> list[Entry]:
    """The ranks of the newest start; empty for a run of one process, or before training has opened the run."""
    found, sizes, start = [], {}, folder.newest_start(run_dir)
    for path in (run_dir / "launch" / "ranks").glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            values, written = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
            if written < start:
                continue
            rank, age_s = int(path.stem), time.time() - written
            found.append(Entry(rank, str(values["place"]), str(values["operation"]), float(values["for_s"]), age_s))
            sizes[written] = int(values["world_size"])
    # Without Slurm nobody tells when the newest start was: the newest file is of it.
    world_size = sizes[max(sizes)] if sizes else 0
    return sorted(entry for entry in found if entry.rank < world_size)


def describe_trouble(ranks: list[Entry]) -> str:
    """One line that names the ranks; empty if all is well."""
    silent = [entry for entry in ranks if entry.age_s > SILENT_S]
    if silent:
        longest = max(silent, key=lambda entry: entry.age_s)
        where = f"rank {longest.rank} ({longest.place}) for {longest.age_s:.0f} s, last in '{longest.operation}'"
        return f"{len(silent)} of {len(ranks)} ranks silent: {_numbers(silent)}; {where}"
    still_s = min((entry.for_s + entry.age_s for entry in ranks), default=0.0)
    if still_s <= SILENT_S:
        return ""
    groups: dict[str, list[Entry]] = {}
    for entry in ranks:
        groups.setdefault(entry.operation, []).append(entry)
    rarest = sorted(groups.items(), key=lambda item: len(item[1]))  # the odd one is often the one that all wait for
    told = "; ".join(f"rank {_numbers(entries)} in '{operation}'" for operation, entries in rarest[:SHOWN])
    return f"no rank went on for {still_s:.0f} s: {told}"


def _numbers(ranks: Iterable[Entry]) -> str:
    numbers = [str(entry.rank) for entry in ranks]
    return ", ".join(numbers[:SHOWN]) + (f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else "")
