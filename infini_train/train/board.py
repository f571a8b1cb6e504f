"""A run's TensorBoard files, continued by every start whatever its clock says.

TensorBoard reads the event files of a folder in the order of their names, which begin with the time of their making; a
file of a resumed run that sorts before those of earlier starts loses its steps. So a new file's name sorts after all
others. Events are written by the caller, not in a thread as tensorboard's own writer does: errors reach the caller.
"""

import os
import re
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from infini_train.regular_files import open_own

FLUSH_S = 10.0
_STAMP = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class Board(SummaryWriter):
    """A summary writer into a file of its own that hides what earlier starts wrote for steps from `purge_step` on.

    Raises:
        OSError: here and in every method: the file can't be written.
    """

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            events = EventFile(Path(self.log_dir))
            self.file_writer = _Events(events)
            self.all_writers = {self.log_dir: self.file_writer}
            events.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
            if self.purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                events.add_event(Event(wall_time=time.time(), step=self.purge_step, session_log=start))
            events.flush()
        return self.file_writer


class _Events(FileWriter):
    """torch's writer of summaries, without the file that it would open."""

    def __init__(self, events: "EventFile") -> None:
        self.event_writer = events


class EventFile:
    """A file of TensorBoard events; stands in for tensorboard's `EventFileWriter`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._records = RecordWriter(open_own(folder / choose_name(folder, time.time())))
        self._flushed = time.monotonic()

    def get_logdir(self) -> str:
        """The folder."""
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        """Writes an event; it is in the file after `FLUSH_S` at the latest if others follow."""
        self._records.write(event.SerializeToString())
        if time.monotonic() > self._flushed + FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Hands everything to the operating system."""
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Ends the file."""
        self._records.close()


def choose_name(folder: Path, now_s: float) -> str:
    """A name for a new event file that sorts after those in the folder; `now_s`: the time, in seconds since 1970."""
    stamps = [int(match[1]) for path in folder.iterdir() if (match := _STAMP.match(path.name))]
    stamp = max(int(now_s), max(stamps, default=-1) + 1)
    return f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
