"""Pieces of global tensors, and the arithmetic that maps stored pieces onto wanted ones.

A piece is cut twice: tensor parallelism takes a slice (`start`, `shape`) of the global tensor, ZeRO takes a flat range
(`flat_start`, `numel`) of the row-major flattened slice. Such a piece is a union of few boxes of the global tensor, so
stored and wanted pieces are compared box by box, whatever the layouts that cut them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from infini_train.config.errors import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that can't be written, read or used; one line that names the folder, file or tensor."""


class VanishedError(CheckpointError):
    """A checkpoint that is not there, or was removed or replaced while it was read, as the run it belongs to may do."""


class Piece(Protocol):
    """What fragments, wanted pieces and index entries have in common."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def flat_start(self) -> int: ...
    @property
    def numel(self) -> int: ...


@dataclass(frozen=True)
class Fragment:
    """A piece of a global tensor together with its values, to be written."""

    name: str  # global name: "layers.3.attention.linear_q.weight", "layers.3.memory.memory_BKDE"
    kind: str  # "weight", "master", "exp_avg", "exp_avg_sq", "step", "carry", ...
    global_shape: tuple[int, ...]
    start: tuple[int, ...]  # where this rank's tensor-parallel slice begins in the global tensor
    shape: tuple[int, ...]  # of the slice
    flat_start: int  # the tensor's first element within the row-major flattened slice
    tensor: torch.Tensor  # (numel,)

    def __post_init__(self) -> None:
        assert self.tensor.dim() == 1, f"{self.name} ({self.kind}): flatten the tensor"
        _check_bounds(self)

    @property
    def numel(self) -> int:
        return self.tensor.numel()


@dataclass(frozen=True)
class Wanted:
    """A piece of a global tensor to be read. Without a dtype the values come as they are stored."""

    name: str
    kind: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    flat_start: int
    numel: int
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)


def whole_fragment(name: str, kind: str, tensor: torch.Tensor) -> Fragment:
    """The fragment of a tensor that this rank holds entirely."""
    shape = tuple(tensor.shape)
    return Fragment(name, kind, shape, (0,) * len(shape), shape, 0, tensor.detach().reshape(-1))


def whole_wanted(name: str, kind: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Wanted:
    """All of a global tensor of this shape."""
    return Wanted(name, kind, tuple(shape), (0,) * len(shape), tuple(shape), 0, math.prod(shape), dtype)


def _check_bounds(piece: Piece) -> None:
    problem = find_misfit(piece)
    assert problem is None, problem


def find_misfit(piece: Piece) -> str | None:
    """Why a piece can't be one of its global tensor; None if it can."""
    label = f"{piece.name} ({piece.kind})"
    if not len(piece.global_shape) == len(piece.start) == len(piece.shape):
        return f"{label}: ranks differ"
    edges = zip(piece.start, piece.shape, piece.global_shape, strict=True)
    if not all(0 <= start <= start + size <= whole for start, size, whole in edges):
        return f"{label}: slice too large"
    if not 0 <= piece.flat_start <= piece.flat_start + piece.numel <= math.prod(piece.shape):
        return f"{label}: too long"
    return None


# ------------------------------------------------------------------------------------------------------------- geometry


class Box(NamedTuple):
    """Elements lower[i] <= index[i] < upper[i] of a global tensor."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]


class Strided(NamedTuple):
    """A view of a flat tensor: the arguments of `torch.as_strided`."""

    extent: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


P = TypeVar("P", bound=Piece)


class Move(NamedTuple, Generic[P]):
    """Copy `source` of a stored piece to `target` of a wanted one; both views count from their piece's flat start."""

    stored: P
    source: Strided
    target: Strided


def flat_boxes(shape: tuple[int, ...], first: int, stop: int) -> Iterator[Box]:
    """The row-major flat range [first, stop) of a tensor of this shape, as 2 * len(shape) - 1 boxes at most."""
    if first >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = shape[1:]
    row_numel = math.prod(inner)
    (row, head), (last, tail) = divmod(first, row_numel), divmod(stop, row_numel)
    if head:
        yield from _prefix(row, flat_boxes(inner, head, tail if row == last else row_numel))
        row += 1
    if row < last:
        yield Box((row, *[0] * len(inner)), (last, *inner))
    if tail and row <= last:
        yield from _prefix(last, flat_boxes(inner, 0, tail))


def _prefix(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (Box((row, *box.lower), (row + 1, *box.upper)) for box in boxes)


def piece_boxes(piece: Piece) -> list[Box]:
    """The piece's elements as boxes of the global tensor."""
    return [
        Box(_add(piece.start, box.lower), _add(piece.start, box.upper))
        for box in flat_boxes(piece.shape, piece.flat_start, piece.flat_start + piece.numel)
    ]


def _add(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _intersect(one: Box, other: Box) -> Box | None:
    lower = tuple(map(max, one.lower, other.lower))
    upper = tuple(map(min, one.upper, other.upper))
    return Box(lower, upper) if all(a < b for a, b in zip(lower, upper, strict=True)) else None


def _view(box: Box, piece: Piece) -> Strided:
    """Where the box lies within the piece's flat tensor."""
    strides = tuple(accumulate(reversed(piece.shape[1:]), lambda a, b: a * b, initial=1))[::-1][: len(piece.shape)]
    steps = zip(box.lower, piece.start, strides, strict=True)
    offset = sum((index - start) * stride for index, start, stride in steps) - piece.flat_start
    return Strided(tuple(b - a for a, b in zip(box.lower, box.upper, strict=True)), strides, offset)


def _find_overlap(boxes: list[Box]) -> Box | None:
    """Some box that lies in two of these boxes. Sorted by their first dimension, far boxes are never compared."""
    boxes = sorted(boxes)
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if one.upper[:1] and other.lower[0] >= one.upper[0]:
                break
            common = _intersect(one, other)
            if common is not None:
                return common
    return None


def plan_moves(wanted: Piece, stored: Sequence[P]) -> list[Move[P]]:
    """The copies that fill a wanted piece from the stored pieces of the same name and kind.

    Raises:
        CheckpointError: nothing stored, another global shape, elements missing or stored twice.
    """
    label = f"{wanted.name} ({wanted.kind})"
    if not stored:
        raise CheckpointError(f"{label}: is not in the checkpoint")
    for piece in stored:
        if piece.global_shape != wanted.global_shape:
            there, here = list(piece.global_shape), list(wanted.global_shape)
            raise CheckpointError(f"{label}: has shape {there} in the checkpoint and {here} here")
    wanted_boxes = piece_boxes(wanted)
    moves: list[Move[P]] = []
    common_boxes: list[Box] = []
    for piece in stored:
        for box in piece_boxes(piece):
            for common in filter(None, (_intersect(box, other) for other in wanted_boxes)):
                common_boxes.append(common)
                moves.append(Move(piece, _view(common, piece), _view(common, wanted)))
    overlap = _find_overlap(common_boxes)
    if overlap is not None:
        raise CheckpointError(f"{label}: stored twice, from element {list(overlap.lower)} on")
    missing = wanted.numel - sum(math.prod(move.target.extent) for move in moves)
    if missing:
        raise CheckpointError(f"{label}: {missing} of {wanted.numel} elements are missing in the checkpoint")
    return moves
