"""Where the ranks publish their heartbeats and failures: memory that they share, or signed entries of their store.

Ranks of one launcher share a file without a name (memfd), of which each rank has a page that it alone writes: no lock
that a stopped rank could hold, no disk, no port, and nothing left when all have ended.
"""

import json
import os
import threading
import time
import zlib
from typing import Any, NamedTuple, Protocol

from infini_train.environment import BOARD_FD, read_number, world
from infini_train.parallel import meeting

PAGE_BYTES = 16384
MAX_REPORT, MAX_OPERATION = 1000, 200  # characters; JSON may write each in twelve bytes
TORN_READS = 1000  # of a page while its rank writes it: a copy of a few hundred bytes
TORN_S = 0.001  # before the next of them: a writer may lose its core, or a virtual machine its host, in the middle


class Beat(NamedTuple):
    """A rank's heartbeat."""

    count: int
    operations: int  # begun so far
    operation: str
    finished: bool
    place: str  # "host, process 123"

    def describe_lost(self, rank: int) -> str:
        """What to say of this rank if no other heartbeat follows."""
        return f"rank {rank} ({self.place}) stopped answering; last heard of in '{self.operation}'"


class Board(Protocol):
    """What all ranks can read. A RuntimeError means that it is gone."""

    place: str  # where it is kept
    hosted_by_rank_0: bool  # whether it ends with that process

    def publish(self, beat: Beat) -> None:
        """This rank's heartbeat."""

    def read(self, rank: int) -> tuple[Beat | None, bool]:
        """The last heartbeat of a rank, None without any; and whether somebody else has overwritten it since."""

    def report(self, text: str) -> str:
        """Reports a failure to all ranks unless one was reported before; returns the first."""

    def read_report(self) -> str:
        """The failure that was reported; empty without any."""

    def hear(self) -> None:
        """This rank has read the report."""

    def count_heard(self) -> int:
        """How many have."""


def open_board(timeout_s: float) -> Board:
    """The board of this run; see `meeting.open_store` for errors."""
    rank, size = world()
    if meeting.is_inherited():
        return SharedPages(read_number(BOARD_FD), rank, size)
    meeting.open_store(timeout_s)
    return StoreBoard(meeting.SignedStore(meeting.connect(timeout_s)), rank, size)


class SharedPages:
    """A page for each rank in a file that all have open; its first bytes are the content's length and checksum."""

    place, hosted_by_rank_0 = "the memory that the ranks share", False

    def __init__(self, descriptor: int, rank: int, world_size: int) -> None:
        self._descriptor, self._rank, self._size = descriptor, rank, world_size
        self._own: dict[str, Any] = {"beat": None, "report": None, "heard": False}
        self._writing = threading.Lock()  # a heartbeat of one thread must not undo a report of the other

    def publish(self, beat: Beat) -> None:
        self._write(beat=beat._replace(operation=beat.operation[:MAX_OPERATION]))

    def read(self, rank: int) -> tuple[Beat | None, bool]:
        found = self._read(rank).get("beat")
        return (Beat(*found) if found else None), False

    def report(self, text: str) -> str:
        first = self.read_report()
        if not first:
            self._write(report=[time.monotonic_ns(), text[:MAX_REPORT]])
        return first or self.read_report()

    def read_report(self) -> str:
        found = (self._read(rank).get("report") for rank in range(self._size))
        return min((report for report in found if report), default=(0, ""))[1]

    def hear(self) -> None:
        self._write(heard=True)

    def count_heard(self) -> int:
        return sum(bool(self._read(rank).get("heard")) for rank in range(self._size))

    def _write(self, **changes: Any) -> None:
        with self._writing:
            self._own |= changes
            text = json.dumps(self._own).encode()
            assert len(text) <= PAGE_BYTES - 8
            head = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
            os.pwrite(self._descriptor, head + text, self._rank * PAGE_BYTES)

    def _read(self, rank: int) -> dict[str, Any]:
        for _ in range(TORN_READS):
            page = os.pread(self._descriptor, PAGE_BYTES, rank * PAGE_BYTES)
            length, checksum = (int.from_bytes(page[start : start + 4], "little") for start in (0, 4))
            if not length:
                return {}
            text = page[8 : 8 + length]
            if zlib.crc32(text) == checksum:
                return json.loads(text)
            time.sleep(TORN_S)
        raise RuntimeError(f"rank {rank}'s page is damaged")


class StoreBoard:
    """Signed entries of torch's store, over a connection of its own: another's may be blocked in a wait."""

    def __init__(self, store: meeting.SignedStore, rank: int, world_size: int) -> None:
        self._signed, self._rank, self._size = store, rank, world_size
        self._known: dict[int, Beat] = {}
        self.hosted_by_rank_0 = not meeting.is_agents_store()
        self.place = f"the store in {'rank 0' if self.hosted_by_rank_0 else 'the launcher'}'s process"

    def publish(self, beat: Beat) -> None:
        self._signed.set(f"beat/{self._rank}", json.dumps(beat))

    def read(self, rank: int) -> tuple[Beat | None, bool]:
        text, is_foreign = self._signed.read(f"beat/{rank}")
        beat = None if text is None else parse_beat(text)
        if beat is not None:
            self._known[rank] = beat
        known = self._known.get(rank)
        return known, is_foreign or (beat is None and (text is not None or known is not None))

    def report(self, text: str) -> str:
        return self._signed.set_first("failure", text)

    def read_report(self) -> str:
        return self._signed.read("failure")[0] or ""

    def hear(self) -> None:
        self._signed.set(f"heard/{self._rank}", "yes")

    def count_heard(self) -> int:
        return sum(self._signed.read(f"heard/{rank}")[0] is not None for rank in range(self._size))


def parse_beat(text: str) -> Beat | None:
    """None: it is no heartbeat. Without a secret anybody can sign one."""
    try:
        beat = Beat(*json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = (int, int, str, bool, str)
    return beat if all(isinstance(value, kind) for value, kind in zip(beat, kinds, strict=True)) else None
