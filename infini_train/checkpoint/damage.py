"""What is wrong with a checkpoint, file by file and tensor by tensor."""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from infini_train.checkpoint.fragments import CheckpointError, plan_moves, whole_wanted
from infini_train.checkpoint.index import DTYPE_NAMES, FragmentEntry, group_stored
from infini_train.checkpoint.reader import check_file, describe_unreadable, identify, open_tensors, read_index


def find_damage(path: Path, on_file: Callable[[int], None] = lambda size_bytes: None) -> list[str]:
    """One line for each problem of the checkpoint in this folder; none if it can be read back whole.

    Every file is hashed, each fragment looked up in its file, and each tensor's fragments must cover it exactly once. A
    checkpoint that is not there has no damage: the run that it belongs to may remove it while it is read, or put
    another one in its place, which is then looked at.

    Args:
        path: the checkpoint's folder.
        on_file: called after each file with the size that it should have.
    """
    while (before := identify(path)) is not None:
        problems = _find_problems(path, on_file)
        if not problems or identify(path) == before:
            return problems
    return []


def _find_problems(path: Path, on_file: Callable[[int], None]) -> list[str]:
    try:
        index = read_index(path)
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [describe_unreadable(error)]
    entries_of: dict[str, list[FragmentEntry]] = {file.file: [] for file in index.files}
    for entry in index.fragments:
        entries_of[entry.file].append(entry)
    problems: list[str] = []
    for file in index.files:
        try:
            check_file(path / file.file, file, verify=True)
            problems += _misplaced(path / file.file, entries_of[file.file])
        except CheckpointError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(describe_unreadable(error))
        on_file(file.size_bytes)
    for (kind, name), group in group_stored(index.fragments).items():
        try:
            plan_moves(whole_wanted(name, kind, group[0].global_shape), group)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _misplaced(file: Path, entries: list[FragmentEntry]) -> list[str]:
    """Fragments that do not lie in the file as the index says."""
    try:
        with open_tensors(file) as content:
            keys = set(content.keys())
            found = {
                key: (DTYPE_NAMES.get((part := content.get_slice(key))[0:0].dtype), tuple(part.get_shape()))
                for key in (entry.key for entry in entries if entry.key in keys)
            }
    except SafetensorError as error:
        return [f"{file.name} is not a safetensors file ({error})"]
    return [
        f"{file.name} does not hold {entry.key} as {entry.numel} elements of {entry.dtype}"
        for entry in entries
        if found.get(entry.key) != (entry.dtype, (entry.numel,))
    ]
