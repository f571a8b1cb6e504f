"""Checkpoints of a run on disk: save, find, resolve, prune.

    <run_dir>/checkpoints/latest                    one line: the folder saved last
    <run_dir>/checkpoints/step-00001234/            index.json, rank-00000.safetensors, ...
    <run_dir>/checkpoints/.step-00001234.tmp-*      being written, replaced or deleted

A checkpoint appears under its name by one rename, complete and synced. A process may be killed at any moment: what it
leaves under a temporary name is never taken for a checkpoint, and the next save removes it.
"""

import contextlib
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from infini_train.atomic_files import sync_path
from infini_train.checkpoint.fragments import CheckpointError, Fragment, VanishedError
from infini_train.checkpoint.index import dump_index, merge_parts, parse_part
from infini_train.checkpoint.reader import INDEX_FILE, Checkpoint, open_checkpoint, read_index
from infini_train.checkpoint.sync import describe_failure, remove, write_synced
from infini_train.checkpoint.writer import part_file, write_part
from infini_train.regular_files import read_regular

__all__ = ["Checkpoint", "CheckpointError", "find_latest", "open_checkpoint", "prune", "resolve", "save"]

FOLDER = "checkpoints"
LATEST = "latest"
MAX_POINTER_BYTES = 4096
LOOKS = 20  # a run would have to prune as often while one checkpoint is read
_STEP = re.compile(r"step-(\d{8,})")
_REPLACED = "tmp-replaced"  # an old checkpoint, set aside for the moment in which a new one takes its name


# --------------------------------------------------------------------------------------------------------------- saving


def save(
    run_dir: Path,
    step: int,
    fragments: Iterable[Fragment],
    state: dict[str, Any],
    config_tree: dict[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint; all ranks call it together. Returns its folder. An older one of this step is replaced.

    Args:
        run_dir: the run's folder, seen by all ranks.
        step: optimizer steps done.
        fragments: what this rank owns; together all ranks' fragments cover each tensor exactly once.
        state: JSON-able values of rank 0 (data position, generators, tokens seen, ...); other ranks' are ignored.
        config_tree: the run's config as plain values (`infini_train.config.files.to_tree`).
        rank: this process among `world_size`.
        world_size: the number of processes that call.
        barrier: returns when all ranks have called it; called three times.

    Raises:
        CheckpointError: the disk is full or not writable, or some rank failed. Earlier checkpoints stay as they were.
    """
    folder = Path(run_dir) / FOLDER
    final = folder / f"step-{step:08d}"
    aside = _aside(final, "tmp-save")
    failure: Exception | None = None
    attempt_id = uuid.uuid4().hex

    def attempt(action: Callable[[], None]) -> None:
        nonlocal failure
        try:
            if failure is None:
                action()
        except Exception as error:  # kept until the last barrier: a rank that left early would hang the others
            failure = error

    if rank == 0:
        attempt(lambda: _prepare(folder, aside))
    barrier()
    attempt(lambda: write_part(aside, fragments, attempt_id, rank))
    barrier()
    if rank == 0:
        attempt(lambda: _publish(aside, final, world_size, state, config_tree))
        if failure is not None:
            remove(aside)
            with contextlib.suppress(OSError):
                _pointer_aside(folder).unlink()
    barrier()
    if failure is None and rank != 0:
        attempt(lambda: _check_published(final, attempt_id))
    if failure is not None:
        raise describe_failure(failure, folder, step) from failure
    return final


def _prepare(folder: Path, aside: Path) -> None:
    """An empty folder to write into; leftovers of killed processes are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    sync_path(folder.parent)
    for step, path in _stored(folder).items():
        if path.name.startswith("."):  # killed between the two renames of a replacement
            path.rename(folder / f"step-{step:08d}")
    for leftover in folder.glob(".step-*.tmp-*"):
        remove(leftover)
    aside.mkdir()


def _publish(aside: Path, final: Path, world_size: int, state: dict[str, Any], config_tree: dict[str, Any]) -> None:
    """Writes the index, names the folder, points `latest` to it. After the first rename nothing needs space."""
    folder = final.parent
    absent = [rank for rank in range(world_size) if not part_file(aside, rank).is_file()]
    if absent:
        raise CheckpointError(f"rank {absent[0]} of {world_size} failed; see its error")
    parts = [parse_part(part_file(aside, rank).read_text(encoding="utf-8")) for rank in range(world_size)]
    step = int(final.name.removeprefix("step-"))
    write_synced(aside / INDEX_FILE, dump_index(merge_parts(step, parts, state, config_tree)))
    for rank in range(world_size):
        part_file(aside, rank).unlink()
    sync_path(aside)
    pointer = _pointer_aside(folder)
    remove(pointer)  # of a process that was killed
    write_synced(pointer, f"{final.name}\n")
    replaced = _aside(final, _REPLACED)
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync_path(folder)
    pointer.rename(folder / LATEST)
    sync_path(folder)
    remove(replaced)


def _check_published(final: Path, attempt_id: str) -> None:
    try:
        attempts = read_index(final).attempt_ids
    except VanishedError:
        attempts = ()
    if attempt_id not in attempts:
        raise CheckpointError("another rank failed; see its error")


# -------------------------------------------------------------------------------------------------------------- finding


def _aside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _pointer_aside(folder: Path) -> Path:
    return folder / f".{LATEST}.tmp"


def _stored(folder: Path) -> dict[int, Path]:
    """Checkpoint folders by step. One that was being replaced counts while the new one has not taken its name."""
    found: dict[int, Path] = {}
    for pattern, prefix, suffix in ((f".step-*.{_REPLACED}", ".", f".{_REPLACED}"), ("step-*", "", "")):
        for path in folder.glob(pattern):
            match = _STEP.fullmatch(path.name.removeprefix(prefix).removesuffix(suffix))
            if match and path.is_dir():
                found[int(match[1])] = path
    return found


def _latest_step(folder: Path) -> int | None:
    """The step that the `latest` file names; None without a readable one."""
    try:
        text = read_regular(folder / LATEST, MAX_POINTER_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = _STEP.fullmatch(text.strip())
    return int(match[1]) if match else None


def _look(folder: Path) -> tuple[dict[int, Path], int | None]:
    """`_stored` and `_latest_step`, as of one moment: a run that saves and prunes meanwhile is looked at again."""
    for _ in range(LOOKS):
        stored, latest = _stored(folder), _latest_step(folder)
        if latest is None or latest in stored:
            break
    return stored, latest


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoint named by `latest`, then all others from the highest step down."""
    stored, latest = _look(folder)
    return [stored[step] for step in sorted(stored, key=lambda step: (step == latest, step), reverse=True)]


T = TypeVar("T")


def look_again(read: Callable[[], T]) -> T:
    """Calls `read`, again where the checkpoint that it has found vanishes: the run that it belongs to has a newer one.

    Raises:
        VanishedError: `LOOKS` times in a row.
    """
    for _ in range(LOOKS - 1):
        with contextlib.suppress(VanishedError):
            return read()
    return read()


def find_latest(
    run_dir: Path, on_problem: Callable[[str], None], on_damaged: Callable[[Path], None] = lambda path: None
) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies, or None when the run has none at all.

    Args:
        run_dir: the run's folder.
        on_problem: receives one line for each newer checkpoint that is torn or corrupt.
        on_damaged: receives their folders.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    checkpoint, problems, damaged = look_again(lambda: _find_valid(Path(run_dir) / FOLDER))
    if checkpoint is not None:
        for problem in problems:
            on_problem(f"{problem}; {checkpoint.path.name} is used instead")
        for path in damaged:
            on_damaged(path)
    return checkpoint


def _find_valid(folder: Path) -> tuple[Checkpoint | None, list[str], list[Path]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones, and their folders."""
    dangling = dangling_pointer(folder)
    problems, damaged = [dangling] if dangling else [], []
    for path in _newest_first(folder):
        try:
            return open_checkpoint(path), problems, damaged
        except VanishedError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
            damaged.append(path)
    if problems:
        raise CheckpointError(f"no valid checkpoint: {problems[0]}; restore one, or move {folder} away to start anew")
    return None, [], []


def set_aside(damaged: Iterable[Path], used: Checkpoint) -> list[Path]:
    """Renames damaged checkpoints, so that they do not count as the last ones when older ones are pruned.

    The one that is used becomes the latest. For the run alone, which holds its folder's lock.

    Returns:
        Where they are now.

    Raises:
        OSError: the folder can't be written.
    """
    moved = []
    for path in damaged:
        match = _STEP.search(path.name)
        aside = path.with_name(f"damaged-step-{int(match[1]):08d}" if match else f"damaged-{path.name}")
        remove(aside)
        path.rename(aside)
        moved.append(aside)
    if moved:
        folder = used.path.parent
        pointer = _pointer_aside(folder)
        remove(pointer)
        write_synced(pointer, f"step-{used.step:08d}\n")
        pointer.rename(folder / LATEST)
        sync_path(folder)
    return moved


def resolve(path: Path) -> Path:
    """The checkpoint folder meant by a checkpoint folder, a run folder or a `checkpoints` folder (their latest).

    Raises:
        CheckpointError: nothing of the kind is there.
    """
    return list_checkpoints(path)[0]


def list_checkpoints(path: Path) -> list[Path]:
    """All checkpoint folders meant by a checkpoint folder, a run folder or a `checkpoints` folder; the latest first.

    Raises:
        CheckpointError: nothing of the kind is there.
    """
    path = Path(path)
    if (path / INDEX_FILE).is_file() or (_STEP.fullmatch(path.name) and path.is_dir()):
        return [path]
    for folder in (path / FOLDER, path):
        found = _newest_first(folder)
        if found:
            return found
    problem = "holds no checkpoint" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {problem}; give a checkpoint, or the folder of a run that has saved one")


def find_step(run_dir: Path, step: int) -> Path:
    """The folder of a run's checkpoint of this step, for the ranks that learn from rank 0 what was found.

    Raises:
        CheckpointError: there is none; not all ranks see the same files.
    """
    folder = Path(run_dir) / FOLDER
    found = _stored(folder).get(step)
    if found is None:
        raise CheckpointError(f"{folder}: step {step} is not there for this rank; all ranks need the same run_dir")
    return found


def dangling_pointer(folder: Path) -> str | None:
    """What is wrong with the `latest` file of a `checkpoints` folder, if it names a checkpoint that is not there."""
    stored, latest = _look(folder)
    if latest is None or latest in stored:
        return None
    return f"{folder / LATEST}: names step-{latest:08d}, which is missing"


# ------------------------------------------------------------------------------------------------------------ retention


def prune(run_dir: Path, keep_last: int, milestone_every_steps: int | None) -> None:
    """Deletes all checkpoints but the last `keep_last` and the milestones. One rank calls it.

    "Last" counts back from the one that `latest` names. Those beyond it were left by a run that was since resumed from
    an earlier step; they stay until the run has passed them.
    """
    assert keep_last >= 1
    folder = Path(run_dir) / FOLDER
    stored, latest = _stored(folder), _latest_step(folder)
    past = sorted((step for step in stored if latest is None or step <= latest), reverse=True)
    for step in past[keep_last:]:
        if milestone_every_steps is None or step % milestone_every_steps:
            condemned = _aside(folder / f"step-{step:08d}", "tmp-pruned")
            remove(condemned)
            stored[step].rename(condemned)  # never half a checkpoint under a checkpoint's name
            remove(condemned)
