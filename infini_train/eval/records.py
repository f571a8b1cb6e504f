"""What a long measurement has found so far, on disk, so that it goes on where it was stopped; and where results go."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from matplotlib.figure import Figure

from infini_train.atomic_files import replacing, write_atomic
from infini_train.checkpoint.store import FOLDER
from infini_train.config.errors import ConfigError

RecordT = TypeVar("RecordT")  # a dataclass whose fields are plain values


class RecordFile(Generic[RecordT]):
    """Records on disk, a line each.

    Args:
        path: of the file; its folder need not exist.
        kind: dataclass of the records.
        settings: what the records depend on besides what they say themselves; the file's first line.
        overwrite: begin anew.

    Attributes:
        records: all that are there.

    Raises:
        ConfigError: the file holds records under other settings.
    """

    def __init__(
        self, path: Path, kind: Callable[..., RecordT], settings: dict[str, Any], *, overwrite: bool = False
    ) -> None:
        self._path, self._settings = path, settings
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() and not overwrite else ""
        head, *lines = text.splitlines() or [""]
        self.records = [record for line in lines if (record := _parse(kind, line)) is not None]
        if text:
            self._compare(head)
        self._begun = bool(text) and text.endswith("\n") and len(self.records) == len(lines)

    def _compare(self, head: str) -> None:
        advice = "name another folder, or pass --overwrite"
        try:
            there = dict(json.loads(head)["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--out: {self._path} holds no results of this test; {advice}") from error
        for name, value in self._settings.items():
            if there.get(name) != value:
                raise ConfigError(
                    f"--out: {self._path.parent} holds another test ({name}: {there.get(name)}, not {value}); {advice}"
                )

    def append(self, records: Sequence[RecordT]) -> None:
        """Adds records; they are on disk when this returns."""
        self.records += records
        if not self._begun:  # a new file, or one that was torn: whole or not at all
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"settings": self._settings}, *map(asdict, self.records)]
            write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in lines))
            self._begun = True
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(asdict(record)) + "\n" for record in records))
            stream.flush()
            os.fsync(stream.fileno())


def _parse(kind: Callable[..., RecordT], line: str) -> RecordT | None:
    try:
        return kind(**json.loads(line))
    except (ValueError, TypeError):
        return None  # the last line of a process that was killed


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a PNG that appears whole or not at all."""
    with replacing(path, durable=False) as partial:
        figure.savefig(partial, format="png", dpi=150)


def find_home(checkpoint: Path) -> Path:
    """The folder that a checkpoint's results belong to: its run's; its own, if it lies outside of one."""
    path = Path(os.path.abspath(checkpoint))
    return path.parent.parent if path.parent.name == FOLDER else path


def hash_checkpoint(checkpoint: Path) -> str:
    """Identifies the weights: sha256 of the index, which holds the sums of the rest."""
    return hashlib.sha256((checkpoint / "index.json").read_bytes()).hexdigest()
