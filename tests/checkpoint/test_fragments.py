"""The arithmetic of pieces: any cut can be put together from any other cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.checkpoint.fragments import (
    CheckpointError,
    Fragment,
    Wanted,
    flat_boxes,
    piece_boxes,
    plan_moves,
    whole_fragment,
    whole_wanted,
)


def grid(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@settings(deadline=None)
@given(shapes, st.data())
def test_flat_boxes_are_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    first = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(first, numel))
    boxes = list(flat_boxes(shape, first, stop))
    parts = [grid(shape)[tuple(map(slice, box.lower, box.upper))].flatten().tolist() if shape else [0] for box in boxes]
    assert sum(parts, []) == list(range(first, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def cut(tensor: torch.Tensor, data: st.DataObject, name: str) -> list[Fragment]:
    """The tensor sliced along one random dimension at random places, each slice cut into random flat ranges."""
    dim = data.draw(st.integers(0, tensor.dim() - 1)) if tensor.dim() else None
    size = tensor.shape[dim] if dim is not None else 1
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1)))), size] if size > 1 else [0, size]
    fragments = []
    for low, high in zip(edges, edges[1:], strict=False):
        part = tensor if dim is None else tensor.narrow(dim, low, high - low)
        start = tuple(low if i == dim else 0 for i in range(tensor.dim()))
        flat = part.reshape(-1).contiguous()  # a narrowed tensor may flatten to a strided view
        inner = sorted(
            data.draw(st.lists(st.integers(0, flat.numel()), max_size=3))
        )  # repeats: a rank that owns nothing
        bounds = [0, *inner, flat.numel()]
        for first, stop in zip(bounds, bounds[1:], strict=False):
            shape = tuple(part.shape)
            fragments.append(Fragment(name, "weight", tuple(tensor.shape), start, shape, first, flat[first:stop]))
    return fragments


def wanted_of(fragment: Fragment) -> Wanted:
    f = fragment
    return Wanted(f.name, f.kind, f.global_shape, f.start, f.shape, f.flat_start, f.numel)


@settings(max_examples=200, deadline=None)
@given(shapes, st.data())
def test_any_layout_fills_any_other(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = grid(shape)
    stored = cut(tensor, data, "w")
    for expected in cut(tensor, data, "w"):
        result = torch.full_like(expected.tensor, -1)
        for move in plan_moves(wanted_of(expected), stored):
            target = result.as_strided(*move.target)
            target.copy_(
                move.stored.tensor.as_strided(
                    move.source.extent, move.source.strides, move.source.offset + move.stored.tensor.storage_offset()
                )
            )
        assert torch.equal(result, expected.tensor)


@settings(max_examples=100, deadline=None)
@given(shapes, st.data())
def test_a_gap_or_an_overlap_is_refused(shape: tuple[int, ...], data: st.DataObject) -> None:
    stored = [fragment for fragment in cut(grid(shape), data, "layers.0.w") if fragment.numel]
    victim = data.draw(st.integers(0, len(stored) - 1))
    wanted = whole_wanted("layers.0.w", "weight", shape)
    with pytest.raises(CheckpointError, match=r"^layers\.0\.w \(weight\): stored twice, from element"):
        plan_moves(wanted, [*stored, stored[victim]])
    with pytest.raises(CheckpointError, match=r"^layers\.0\.w \(weight\): (\d+ of \d+ elements|is not in)"):
        plan_moves(wanted, stored[:victim] + stored[victim + 1 :])


def test_an_overlap_that_hides_a_gap_is_refused() -> None:
    tensor = torch.arange(12)
    stored = [Fragment("w", "weight", (12,), (0,), (12,), start, tensor[start : start + 6]) for start in (0, 3)]
    with pytest.raises(CheckpointError, match=r"stored twice, from element \[3\]"):
        plan_moves(whole_wanted("w", "weight", (12,)), stored)


def test_only_what_is_wanted_must_be_there() -> None:
    stored = [Fragment("w", "weight", (4, 4), (2, 0), (2, 4), 0, torch.arange(8))]
    moves = plan_moves(Wanted("w", "weight", (4, 4), (3, 1), (1, 2), 0, 2), stored)
    assert [(m.source.extent, m.source.offset, m.target.offset) for m in moves] == [((1, 2), 5, 0)]


def test_another_shape_is_refused_with_both() -> None:
    stored = [whole_fragment("w", "weight", torch.zeros(4, 2))]
    with pytest.raises(CheckpointError, match=r"w \(weight\): has shape \[4, 2\] in the checkpoint and \[4, 3\] here"):
        plan_moves(whole_wanted("w", "weight", (4, 3)), stored)


def test_pieces_that_leave_their_tensor_are_invariant_errors() -> None:
    for arguments in (((4,), (2,), (3,), 0, 1), ((4,), (0,), (4,), 3, 2), ((4, 4), (0,), (4,), 0, 1)):
        with pytest.raises(AssertionError):
            Wanted("w", "weight", *arguments)


def test_whole_fragment_of_a_scalar_and_of_nothing() -> None:
    scalar = whole_fragment("step", "step", torch.tensor(7))
    assert (scalar.global_shape, scalar.numel, len(piece_boxes(scalar))) == ((), 1, 1)
    assert piece_boxes(whole_fragment("none", "carry", torch.zeros(0, 4))) == []
