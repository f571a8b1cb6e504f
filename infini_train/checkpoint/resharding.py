"""A checkpoint rewritten as whole tensors by one process, one tensor after the other."""

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from infini_train.checkpoint.fragments import CheckpointError, Fragment, whole_fragment
from infini_train.checkpoint.index import DTYPES, dump_index, merge_parts, parse_part
from infini_train.checkpoint.reader import INDEX_FILE, Checkpoint
from infini_train.checkpoint.sync import appearing, check_new, describe_failure, write_synced
from infini_train.checkpoint.writer import MAX_FILE_BYTES, part_file, write_part

KEPT_AS_STORED = ("carry",)  # memory is a sum over all that was read: a run goes on from it in the dtype it had


def reshard(
    source: Checkpoint,
    target: Path,
    *,
    kinds: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_tensor: Callable[[int], None] = lambda numel: None,
) -> None:
    """Writes a checkpoint of the same step, state and config in which every tensor is one piece.

    At most about one file's tensors are held in memory. The folder appears under its name complete, or not at all.

    Args:
        source: opened, and better verified: what is written gets new hashes.
        target: the new checkpoint's folder; it must not exist.
        kinds: what to keep; None: everything.
        dtype: floating-point dtype of weights and moments; None, and the carried memory: as they are stored.
        max_file_bytes: tensors are spread over files of about this size.
        on_tensor: called with the number of elements of each tensor read.

    Raises:
        CheckpointError: the target exists or can't be written, or a kind is not in the checkpoint.
    """
    stored = dict.fromkeys(entry.kind for entry in source.index.fragments)
    unknown = [kind for kind in kinds or () if kind not in stored]
    if unknown:
        raise CheckpointError(f"{source.path}: holds no {unknown[0]}; its kinds are {', '.join(stored)}")
    target = Path(target)
    check_new(target)
    chosen = [kind for kind in stored if kinds is None or kind in kinds]
    tensors = _whole_tensors(source, chosen, dtype, on_tensor)
    write_whole(target, source.step, tensors, source.state, source.config, max_file_bytes)


def write_whole(
    target: Path,
    step: int,
    fragments: Iterable[Fragment],
    state: dict[str, Any],
    config: dict[str, Any],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes a checkpoint by one process, which appears under its name complete, or not at all.

    Args:
        target: its folder, which does not exist.
        step: optimizer steps done.
        fragments: of whole tensors; about one file's are held in memory.
        state: JSON-able values.
        config: the run's config as plain values.
        max_file_bytes: tensors are spread over files of about this size.

    Raises:
        CheckpointError: it can't be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with appearing(target, "tmp-reshard") as aside:
            write_part(aside, fragments, uuid.uuid4().hex, 0, max_file_bytes)
            part = parse_part(part_file(aside, 0).read_text(encoding="utf-8"))
            write_synced(aside / INDEX_FILE, dump_index(merge_parts(step, [part], state, config)))
            part_file(aside, 0).unlink()
    except Exception as error:
        raise describe_failure(error, target, step) from error


def _whole_tensors(
    source: Checkpoint, kinds: list[str], dtype: torch.dtype | None, on_tensor: Callable[[int], None]
) -> Iterator[Fragment]:
    dtypes = {(entry.kind, entry.name): DTYPES.get(entry.dtype) for entry in source.index.fragments}
    for kind in kinds:
        wanted = []
        for name in source.names(kind):
            stored = dtypes[kind, name]
            convert = kind not in KEPT_AS_STORED and stored is not None and stored.is_floating_point
            wanted.append(source.whole(name, kind, dtype if convert else None))
        for piece, values in source.read(wanted):
            on_tensor(piece.numel)
            yield whole_fragment(piece.name, kind, values.view(piece.global_shape))
