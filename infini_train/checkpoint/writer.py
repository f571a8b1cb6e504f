"""What one rank writes of a checkpoint: its fragments as safetensors files, and their description."""

import math
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from infini_train.atomic_files import sync_path
from infini_train.checkpoint.fragments import CheckpointError, Fragment
from infini_train.checkpoint.index import DTYPE_NAMES, FragmentEntry, Part, StoredFile, dump_part
from infini_train.checkpoint.reader import hash_file
from infini_train.checkpoint.sync import write_synced

MAX_FILE_BYTES = 4 * 2**30


def write_part(
    aside: Path, fragments: Iterable[Fragment], attempt_id: str, rank: int, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes this rank's safetensors files and, when they are safe on disk, their description (see `Part`).

    Args:
        aside: the folder that becomes the checkpoint.
        fragments: what this rank owns.
        attempt_id: marks this attempt of this rank.
        rank: names the files.
        max_file_bytes: tensors are spread over files of about this size.
    """
    files: list[StoredFile] = []
    entries: list[FragmentEntry] = []
    for number, group in enumerate(_group_by_size(fragments, max_file_bytes)):
        name = f"rank-{rank:05d}" + (f".{number:04d}" if number else "") + ".safetensors"
        entries += [_describe(fragment, key, name) for key, fragment in group.items()]
        save_file({key: fragment.tensor for key, fragment in group.items()}, aside / name)
        # safetensors makes the file private to the user; give it what the umask gave the folder
        (aside / name).chmod(stat.S_IMODE(aside.stat().st_mode) & 0o666)
        sync_path(aside / name)
        files.append(StoredFile(name, (aside / name).stat().st_size, hash_file(aside / name)))
    write_synced(part_file(aside, rank), dump_part(Part(attempt_id, tuple(files), tuple(entries))))


def part_file(aside: Path, rank: int) -> Path:
    """Where a rank leaves the description of what it wrote."""
    return aside / f"rank-{rank:05d}.json"


def _group_by_size(fragments: Iterable[Fragment], max_file_bytes: int) -> Iterator[dict[str, Fragment]]:
    """Fragments on the CPU by their key, in groups of at most `max_file_bytes` (or of a single larger fragment)."""
    group: dict[str, Fragment] = {}
    size_bytes, pointers = 0, set[int]()
    for fragment in fragments:
        if fragment.numel == 0 and math.prod(fragment.global_shape):  # a ZeRO rank that owns nothing of this tensor
            continue
        tensor = fragment.tensor.detach().cpu().contiguous()
        if group and size_bytes + tensor.nbytes > max_file_bytes:
            yield group
            group, size_bytes, pointers = {}, 0, set()
        key = _key(fragment)
        if key in group:
            raise CheckpointError(f"{fragment.name} ({fragment.kind}): stored twice by one rank")
        # safetensors refuses one memory under two names in a file
        group[key] = replace(fragment, tensor=tensor.clone() if tensor.data_ptr() in pointers else tensor)
        pointers.add(tensor.data_ptr())
        size_bytes += tensor.nbytes
    if group:
        yield group


def _key(fragment: Fragment) -> str:
    """The tensor's name in its file; other tools see at once what a whole tensor is."""
    key = f"{fragment.kind}/{fragment.name}"
    if fragment.shape == fragment.global_shape and fragment.numel == math.prod(fragment.shape):
        return key
    return f"{key}@{','.join(map(str, fragment.start))}+{fragment.flat_start}"


def _describe(fragment: Fragment, key: str, file: str) -> FragmentEntry:
    place = {name: getattr(fragment, name) for name in ("name", "kind", "global_shape", "start", "shape", "flat_start")}
    return FragmentEntry(**place, dtype=DTYPE_NAMES[fragment.tensor.dtype], numel=fragment.numel, file=file, key=key)
