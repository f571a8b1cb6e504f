"""Shipped runs under their old names: each still loads as before, and says in one line what to write now."""

from pathlib import Path
from typing import NamedTuple

from infini_train.config.deprecated import note_once

GPUS_PER_NODE = 8  # of the nodes that the old names counted


class Renamed(NamedTuple):
    """Where a run went: the config's name today and, if it became one of its scales, the number of processes."""

    name: str
    world_size: int | None = None


RENAMED = {
    **{
        f"{size}_{nodes}nodes": Renamed(size, nodes * GPUS_PER_NODE)
        for size in ("1b", "3b", "8b")
        for nodes in (4, 16, 64)
    },
    "passkey_linear": Renamed("passkey_no_conv"),  # "linear" is also what passkey.yaml is
    "passkey_delta": Renamed("passkey_no_conv_delta"),
}


def find_renamed(path: Path) -> tuple[Path, Renamed | None]:
    """The file to read for a path: itself or, if it is gone and has an old name, the file that took its place."""
    old = RENAMED.get(path.stem)
    return (path, None) if old is None or path.is_file() else (path.with_stem(old.name), old)


def current_words(config: str) -> list[str]:
    """The CONFIG argument of infini-train train as it is written today, with the options that an old name stood for."""
    path, old = Path(config), RENAMED.get(Path(config).stem)
    if old is None or path.is_file():
        return [config]
    size = [] if old.world_size is None else [f"--world-size={old.world_size}"]
    return [str(path.with_stem(old.name)), *size, f"--set=name={path.stem}"]


def note_renamed(path: Path, old: Renamed) -> None:
    """Says once what to write now."""
    now = f"{old.name}, with --set name={path.stem} to continue a run of that name"
    if old.world_size is not None:
        now = f"{old.name} --world-size {old.world_size} (infini-launch: --nodes {old.world_size // GPUS_PER_NODE})"
    note_once(f"{path.stem} is an old name; write {now}")
