"""An opened checkpoint: what it holds, and its tensors in whatever layout the reader wants."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from infini_train.checkpoint.fragments import (
    CheckpointError,
    Move,
    Strided,
    VanishedError,
    Wanted,
    plan_moves,
    whole_wanted,
)
from infini_train.checkpoint.index import DTYPES, FragmentEntry, Index, StoredFile, group_stored, parse_index
from infini_train.command_errors import first_line
from infini_train.config.errors import ConfigError
from infini_train.config.files import to_tree, validate
from infini_train.config.model import ModelConfig
from infini_train.regular_files import open_regular, read_regular, require_regular

INDEX_FILE = "index.json"
MAX_INDEX_BYTES = 2**27  # a fragment takes about 350; parsed they take some ten times as much memory
_OPEN_FILES = 64  # kept open while reading; far below the usual limit of 1024 descriptors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there."""

    path: Path
    step: int
    state: dict[str, Any]  # data position, generators, tokens seen, ...
    config: dict[str, Any]  # the run's config tree
    index: Index
    folder_id: "FolderId"

    @cached_property
    def _groups(self) -> dict[tuple[str, str], list[FragmentEntry]]:
        return group_stored(self.index.fragments)

    @property
    def special_ids(self) -> tuple[int, int, int] | None:
        """Ids of bos, eos and pad of its tokenizer; None: written before they were kept."""
        found = self.state.get("special_ids")
        return None if found is None else (found[0], found[1], found[2])

    @property
    def attention_kind(self) -> str | None:
        """The `model.attention.kind` of its config; None where it is not known."""
        return self.config.get("model", {}).get("attention", {}).get("kind")

    def attention_fields(self, layer: int | None = None) -> dict[str, Any]:
        """The fields of `model.attention` of its config, or of a layer's; those not known then are missing."""
        fields: dict[str, Any] = self.config.get("model", {}).get("attention", {})
        model = None if layer is None else self._model
        if model is None or layer is None or not 0 <= layer < model.num_layers:
            return fields
        variant = model.layers[layer]
        return fields if variant is model.attention else to_tree(variant)

    @cached_property
    def _model(self) -> ModelConfig | None:
        try:
            return validate(self.config).model
        except ConfigError:  # written for another schema
            return None

    def names(self, kind: str) -> tuple[str, ...]:
        """Global names of the tensors of this kind, in the order of writing."""
        return tuple(name for group_kind, name in self._groups if group_kind == kind)

    def whole(self, name: str, kind: str, dtype: torch.dtype | None = None) -> Wanted:
        """All of a stored tensor, as a piece to pass to `read`."""
        group = self._groups.get((kind, name))
        if group is None:
            raise CheckpointError(f"{self.path}: {name} ({kind}): is not in the checkpoint")
        return whole_wanted(name, kind, group[0].global_shape, dtype)

    def read(self, wanted: Iterable[Wanted]) -> Iterator[tuple[Wanted, torch.Tensor]]:
        """Pairs of a wanted piece and its flat (numel,) CPU tensor, one after the other.

        All pieces are looked up before the first one is read, so that a mismatch leaves nothing half loaded. Only the
        pages of the files that hold wanted elements are read. Floating-point values convert to the wanted dtype.

        Raises:
            CheckpointError: a piece is missing, incomplete, stored twice, or of another shape or dtype.
            VanishedError: the checkpoint was removed or replaced meanwhile.
        """
        pieces = tuple(wanted)
        try:
            plans = [plan_moves(piece, self._groups.get((piece.kind, piece.name), [])) for piece in pieces]
            dtypes = [_choose_dtype(p, self._groups[p.kind, p.name]) for p in pieces]
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        return self._fill(zip(pieces, plans, dtypes, strict=True))

    def _fill(
        self, plans: Iterable[tuple[Wanted, list[Move[FragmentEntry]], torch.dtype]]
    ) -> Iterator[tuple[Wanted, torch.Tensor]]:
        opened = lru_cache(_OPEN_FILES)(lambda file: open_tensors(self.path / file))
        for piece, moves, dtype in plans:
            tensor = torch.empty(piece.numel, dtype=dtype)
            for move in moves:
                try:
                    source = _slice(opened(move.stored.file), move)
                except (SafetensorError, OSError) as error:
                    check_same_folder(self.path, self.folder_id)
                    raise CheckpointError(f"{self.path}: {move.stored.file} is missing or corrupt ({error})") from error
                tensor.as_strided(*move.target).copy_(source)
            yield piece, tensor
        if self.path.exists():  # otherwise it was removed, but all that was opened is of one checkpoint
            check_same_folder(self.path, self.folder_id)


def open_tensors(path: Path) -> Any:
    """A safetensors file, as `safetensors.safe_open` opens it.

    Raises:
        SafetensorError: it is none, or has gone.
        OSError: it can't be opened.
    """
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # torch maps the file, after safetensors has read its header
        raise SafetensorError(first_line(error)) from error


def _slice(file: Any, move: Move[FragmentEntry]) -> torch.Tensor:
    """The wanted elements of a stored fragment. safetensors maps the run that holds them; unused pages stay on disk."""
    first, stop = _run(move.source)
    stored = file.get_slice(move.stored.key)
    run = stored[first:stop]
    if stored.get_shape() != [move.stored.numel] or run.dtype != DTYPES[move.stored.dtype]:
        raise SafetensorError(f"{move.stored.key} is not what the index says")
    return run.as_strided(move.source.extent, move.source.strides, run.storage_offset())


def _run(view: Strided) -> tuple[int, int]:
    """The flat range from the first to the last element of a view (never empty)."""
    assert math.prod(view.extent)
    span = sum((size - 1) * stride for size, stride in zip(view.extent, view.strides, strict=True))
    return view.offset, view.offset + span + 1


def _choose_dtype(wanted: Wanted, group: list[FragmentEntry]) -> torch.dtype:
    label = f"{wanted.name} ({wanted.kind})"
    names = {entry.dtype for entry in group}
    unknown = names - DTYPES.keys()
    if unknown or len(names) != 1:
        raise CheckpointError(f"{label}: is stored as {', '.join(sorted(names))}; one known dtype is needed")
    stored = DTYPES[names.pop()]
    dtype = wanted.dtype or stored
    if dtype != stored and not (dtype.is_floating_point and stored.is_floating_point):
        raise CheckpointError(f"{label}: is stored as {stored} and can't become {dtype}")
    return dtype


FolderId = tuple[int, int] | None  # None: there is no folder


def identify(path: Path) -> FolderId:
    """What tells a folder from another one of the same name: one that was removed, or replaced, has another."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def check_same_folder(path: Path, before: FolderId) -> None:
    """Whether a checkpoint is still the one that it was.

    Raises:
        VanishedError: it is not.
    """
    if identify(path) != before:
        raise VanishedError(f"{path}: was removed or replaced while it was read; run the command again")


def open_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """The checkpoint in this folder. Index and file sizes are always checked, with `verify` every file's sha256 too.

    Hashing reads everything: with several ranks let one verify, and the others open without.

    Raises:
        CheckpointError: names the file and the problem (missing, torn, corrupt, another format version).
        VanishedError: there is no such folder, or it was removed or replaced meanwhile.
    """
    path = Path(path)
    before = identify(path)
    try:
        index = read_index(path)
        for file in index.files:
            check_file(path / file.file, file, verify)
    except CheckpointError as error:
        check_same_folder(path, before)
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        check_same_folder(path, before)
        raise CheckpointError(f"{path}: {describe_unreadable(error)}") from error
    return Checkpoint(path, index.step, index.state, index.config, index, before)


def describe_unreadable(error: OSError) -> str:
    """What the operating system says of a file of a checkpoint, without the folder."""
    name = f"{Path(os.fsdecode(error.filename)).name} " if error.filename else ""
    return f"{name}can't be read ({error.strerror})"


def read_index(path: Path) -> Index:
    """The index of the checkpoint in this folder.

    Raises:
        CheckpointError: missing, torn or corrupt; the message names the file, not the folder.
        VanishedError: there is no such folder.
        OSError: it can't be read, or is no regular file.
    """
    if not path.is_dir():
        raise VanishedError("no such checkpoint folder")
    try:
        return parse_index(read_regular(path / INDEX_FILE, MAX_INDEX_BYTES).decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{INDEX_FILE} is missing") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{INDEX_FILE} is torn or corrupt (not UTF-8)") from error
    except CheckpointError as error:
        raise CheckpointError(f"{INDEX_FILE} {error}") from error


def check_file(file: Path, entry: StoredFile, verify: bool) -> None:
    """Compares a file's size, and with `verify` its sha256, with what the index says.

    Raises:
        CheckpointError: missing, torn or corrupt; the message names the file, not the folder.
        OSError: it can't be read, or is no regular file.
    """
    try:
        size_bytes = require_regular(file).st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{entry.file} is missing") from error
    if size_bytes != entry.size_bytes:
        raise CheckpointError(f"{entry.file} is torn ({size_bytes} bytes instead of {entry.size_bytes})")
    if verify and hash_file(file) != entry.sha256:
        raise CheckpointError(f"{entry.file} is corrupt (its sha256 differs)")


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, as hex digits."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
