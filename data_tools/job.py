"""What the commands that work through a whole corpus have in common."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from data_tools.documents import ReadOptions
from data_tools.pipes import is_pipe
from data_tools.problems import LeftOut, SettingError
from data_tools.storage import STDIN, SourceFile
from data_tools.tasks import share


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How to go through a corpus; of these, the results depend on `read` alone."""

    read: ReadOptions = ReadOptions()
    on_bad_record: Literal["error", "skip"] = "error"
    max_bad_records: int = 1000
    overwrite: bool = False
    restart: bool = False  # discard what an unfinished run has done
    workers: int = 1
    part: str | None = None  # I/N: do the I-th of N parts of the work

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise SettingError("{workers}: must be positive")
        if self.read.max_record_bytes < 1:
            raise SettingError("{max_record_bytes}: must be positive")
        share(self.part, 0)

    def new_left_out(self) -> LeftOut:
        """Counts by these rules."""
        return LeftOut(on_bad_record=self.on_bad_record, max_bad_records=self.max_bad_records)


def all_older(files: Iterable[SourceFile], made_ns: int) -> bool:
    """Whether all these files are older than what was made of them; URLs and pipes count as older."""
    paths = (file.path for file in files)
    local = (path for path in paths if path != STDIN and "://" not in path and not is_pipe(path))
    return all(os.stat(path).st_mtime_ns < made_ns for path in local)
