"""Written by several ranks at one layout, read by others at another: the values are the same."""

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infini_train.checkpoint.damage import find_damage
from infini_train.checkpoint.fragments import CheckpointError, Fragment, Wanted
from infini_train.checkpoint.index import dump_index, merge_parts, parse_part
from infini_train.checkpoint.reader import INDEX_FILE, Checkpoint, open_checkpoint
from infini_train.checkpoint.resharding import reshard
from infini_train.checkpoint.writer import part_file, write_part

KINDS = {"master": torch.float32, "exp_avg": torch.float32, "weight": torch.bfloat16, "carry": torch.float32}


class Layout(NamedTuple):
    """Ranks in `tensor_size` x `data_size`, and how each tensor is cut."""

    tensor_size: int
    data_size: int
    dims: dict[
        str, int | None
    ]  # tensor -> its tensor-parallel dimension; None: replicated, rank 0 of the group owns it
    edges: dict[str, tuple[float, ...]]  # tensor -> where ZeRO cuts the flat slice, as shares of it


def make_tensors(shapes: list[tuple[int, ...]]) -> dict[tuple[str, str], torch.Tensor]:
    """Different values in every element of every tensor of every kind."""
    tensors: dict[tuple[str, str], torch.Tensor] = {}
    for number, shape in enumerate(shapes):
        for kind, dtype in KINDS.items():
            first = 1000 * len(tensors)
            values = torch.arange(first, first + math.prod(shape)).to(dtype)
            tensors[kind, f"layers.{number}.w"] = values.reshape(shape)
    return tensors


def pieces(tensors: dict[tuple[str, str], torch.Tensor], layout: Layout, rank: int) -> list[Fragment]:
    """What this rank owns: some of each sharded tensor, often nothing; replicated tensors by one group only."""
    tensor_rank, data_rank = rank % layout.tensor_size, rank // layout.tensor_size
    owned = []
    for (kind, name), tensor in tensors.items():
        dim = layout.dims[name]
        if dim is None and tensor_rank:
            continue
        part, start = tensor, [0] * tensor.dim()
        if dim is not None:
            step = tensor.shape[dim] // layout.tensor_size
            start[dim] = step * tensor_rank
            part = tensor.narrow(dim, start[dim], step)
        flat = part.reshape(-1).contiguous()
        bounds = [0, *(round(share * flat.numel()) for share in layout.edges[name]), flat.numel()]
        first, stop = bounds[data_rank], bounds[data_rank + 1]
        place = (tuple(tensor.shape), tuple(start), tuple(part.shape), first)
        owned.append(Fragment(name, kind, *place, flat[first:stop]))
    return owned


def write(folder: Path, tensors: dict[tuple[str, str], torch.Tensor], layout: Layout, file_bytes: int) -> Checkpoint:
    world_size = layout.tensor_size * layout.data_size
    for rank in range(world_size):
        write_part(folder, pieces(tensors, layout, rank), f"attempt {rank}", rank, file_bytes)
    parts = [parse_part(part_file(folder, rank).read_text()) for rank in range(world_size)]
    (folder / INDEX_FILE).write_text(dump_index(merge_parts(3, parts, {"tokens": 5}, {"name": "run"})))
    return open_checkpoint(folder)


@st.composite
def layouts(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> Layout:
    tensor_size, data_size = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 3))
    dims: dict[str, int | None] = {}
    edges: dict[str, tuple[float, ...]] = {}
    shares = st.lists(st.floats(0.0, 1.0), min_size=data_size - 1, max_size=data_size - 1)
    for number, shape in enumerate(shapes):
        divisible = [dim for dim, size in enumerate(shape) if size % tensor_size == 0]
        dims[f"layers.{number}.w"] = draw(st.sampled_from([None, *divisible]))
        edges[f"layers.{number}.w"] = tuple(sorted(draw(shares)))
    return Layout(tensor_size, data_size, dims, edges)


sizes = st.sampled_from([1, 2, 3, 6])
shape_lists = st.lists(st.lists(sizes, max_size=3).map(tuple), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), shapes=shape_lists, file_bytes=st.sampled_from([1, 64, 10**6]))
def test_any_layout_reads_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shapes: list[tuple[int, ...]], file_bytes: int
) -> None:
    tensors = make_tensors(shapes)
    folder = tmp_path_factory.mktemp("layouts") / "stored"
    folder.mkdir()
    checkpoint = write(folder, tensors, data.draw(layouts(shapes)), file_bytes)
    assert find_damage(folder) == []
    other = data.draw(layouts(shapes))
    reshard(checkpoint, folder.with_name("whole"))
    for stored in (checkpoint, open_checkpoint(folder.with_name("whole"))):
        for rank in range(other.tensor_size * other.data_size):
            fragments = pieces(tensors, other, rank)
            wanted = [
                Wanted(f.name, f.kind, f.global_shape, f.start, f.shape, f.flat_start, f.numel) for f in fragments
            ]
            for fragment, (_, values) in zip(fragments, stored.read(wanted), strict=True):
                assert values.dtype == fragment.tensor.dtype
                assert torch.equal(values, fragment.tensor), (fragment.kind, fragment.name)


def test_a_replicated_tensor_written_by_two_ranks_is_refused(tmp_path: Path) -> None:
    """Each replica is right; but who wrote it must be decided, not left to the reader."""
    tensors = make_tensors([(6,)])
    layout = Layout(1, 1, {"layers.0.w": None}, {"layers.0.w": ()})
    for rank in range(2):
        write_part(tmp_path, pieces(tensors, layout, 0), "a", rank)
    parts = [parse_part(part_file(tmp_path, rank).read_text()) for rank in range(2)]
    with pytest.raises(CheckpointError, match=r"^layers\.0\.w \(master\): stored twice, from element \[0\] on$"):
        merge_parts(3, parts, {}, {})


def test_a_rank_that_owns_nothing_at_all(tmp_path: Path) -> None:
    tensors = make_tensors([(4,), ()])
    layout = Layout(2, 2, {"layers.0.w": None, "layers.1.w": None}, {"layers.0.w": (1.0,), "layers.1.w": (0.0,)})
    checkpoint = write(tmp_path, tensors, layout, 10**6)
    assert checkpoint.index.world_size == 4
    owners = {(entry.name, entry.file) for entry in checkpoint.index.fragments}
    assert owners == {("layers.0.w", "rank-00000.safetensors"), ("layers.1.w", "rank-00002.safetensors")}
