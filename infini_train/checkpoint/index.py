"""The JSON index of a checkpoint: what is stored where, with hashes. Every field is checked when it is read."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pydantic
import torch

from infini_train.checkpoint.fragments import CheckpointError, find_misfit, plan_moves, whole_wanted

FORMAT_VERSION = 1
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: str(dtype).removeprefix("torch.") for dtype in _FLOATS + _INTEGERS}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file of the checkpoint."""

    file: str  # a plain name inside the checkpoint's folder
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FragmentEntry:
    """A fragment as it lies in a file: the fields of `Fragment`, with a place instead of values."""

    name: str
    kind: str
    dtype: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    flat_start: int
    numel: int
    file: str
    key: str  # the tensor's name inside the file; there it is one-dimensional


@dataclass(frozen=True)
class Part:
    """What one rank wrote. The id differs with every attempt, so that a rank knows its own from an older one."""

    attempt_id: str
    files: tuple[StoredFile, ...]
    fragments: tuple[FragmentEntry, ...]


@dataclass(frozen=True)
class Index:
    """A whole checkpoint."""

    format_version: int
    step: int
    world_size: int
    attempt_ids: tuple[str, ...]  # of the ranks' parts
    files: tuple[StoredFile, ...]
    fragments: tuple[FragmentEntry, ...]
    state: dict[str, Any]
    config: dict[str, Any]


def group_stored(fragments: tuple[FragmentEntry, ...]) -> dict[tuple[str, str], list[FragmentEntry]]:
    """Entries by (kind, name), in the order of the index."""
    groups: dict[tuple[str, str], list[FragmentEntry]] = {}
    for entry in fragments:
        groups.setdefault((entry.kind, entry.name), []).append(entry)
    return groups


def merge_parts(step: int, parts: list[Part], state: dict[str, Any], config: dict[str, Any]) -> Index:
    """The index over all ranks' parts.

    Raises:
        CheckpointError: the fragments of some tensor leave a gap or overlap, so that nobody could read it back.
    """
    fragments = tuple(entry for part in parts for entry in part.fragments)
    for (kind, name), group in group_stored(fragments).items():
        plan_moves(whole_wanted(name, kind, group[0].global_shape), group)
    files = tuple(file for part in parts for file in part.files)
    return Index(
        FORMAT_VERSION, step, len(parts), tuple(part.attempt_id for part in parts), files, fragments, state, config
    )


def dump_part(part: Part) -> str:
    """The part as JSON."""
    return json.dumps(asdict(part))


def parse_part(text: str) -> Part:
    """The inverse of `dump_part`."""
    return pydantic.TypeAdapter(Part).validate_json(text, strict=True)


def dump_index(index: Index) -> str:
    """The index as JSON, with a checksum of itself."""
    # `asdict` would copy every entry deeply; the round trip gives what a reader will see: lists, keys that are text
    lists = {name: [vars(entry) for entry in getattr(index, name)] for name in ("files", "fragments")}
    body = json.loads(json.dumps({**vars(index), **lists}))
    return json.dumps({"checksum": _checksum(body), **body})


def parse_index(text: str) -> Index:
    """The inverse of `dump_index`. What a right checksum does not prove, since anybody can make one, is checked too.

    Raises:
        CheckpointError: torn, altered, or of another format; the message names the problem only, not the file.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("is torn or corrupt (not valid JSON)") from error
    if not isinstance(body, dict) or "format_version" not in body:
        raise CheckpointError("is not a checkpoint's index")
    if body["format_version"] != FORMAT_VERSION:
        version = json.dumps(body["format_version"])
        raise CheckpointError(
            f"has format version {version}; this program reads {FORMAT_VERSION}, use the one that wrote it"
        )
    checksum = body.pop("checksum", None)
    unknown = sorted(body.keys() - {field.name for field in fields(Index)})
    if unknown:  # before anything is made of a value that may be of any size
        raise CheckpointError(f"is corrupt ({ascii(unknown[0][:40])[1:-1]}: unknown key)")
    try:
        if checksum != _checksum(body):
            raise CheckpointError("is corrupt (its checksum differs)")
        index = pydantic.TypeAdapter(Index).validate_json(json.dumps(body), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"is corrupt ({'.'.join(map(str, first['loc']))}: {first['msg']})") from error
    except RecursionError as error:
        raise CheckpointError("is torn or corrupt (nested too deeply)") from error
    _check_content(index)
    return index


def _check_content(index: Index) -> None:
    """Whether each fragment is a part of its tensor and lies in a file of this folder that has room for it.

    Of the config only what readers look up in any version is checked; `config.files.validate` does the rest.
    """
    model = index.config.get("model", {})
    if not isinstance(model, dict) or not isinstance(model.get("attention", {}), dict):
        raise CheckpointError("is corrupt (config.model is not a model)")
    room_bytes = {file.file: file.size_bytes for file in index.files}
    for name in (*room_bytes, *(entry.file for entry in index.fragments)):
        if name not in room_bytes or Path(name).name != name:
            raise CheckpointError(f"is corrupt (it names the unknown file {name})")
    for entry in index.fragments:
        problem = find_misfit(entry)
        if problem is not None:
            raise CheckpointError(f"is corrupt ({problem})")
        room_bytes[entry.file] -= entry.numel * (DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else 0)
    full = [name for name, size_bytes in room_bytes.items() if size_bytes < 0]
    if full:
        raise CheckpointError(f"is corrupt ({full[0]} has no room for what it should hold)")


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
