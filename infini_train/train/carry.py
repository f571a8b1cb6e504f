"""Carried memory as named pieces of global tensors, so that a checkpoint fits any layout and any micro-batches.

States say themselves how they are stored and divided (ops.state): `lanes` over data-parallel ranks and micro-batches,
`kv_heads` over tensor-parallel ranks. All context-parallel ranks carry the same memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from infini_train.checkpoint.fragments import Fragment, Wanted
from infini_train.checkpoint.reader import Checkpoint
from infini_train.config.run import RunConfig
from infini_train.model.slices import Slice, divide
from infini_train.ops.state import KV_HEADS, LANES, Leaf, name_leaves, rebuild
from infini_train.parallel.pipeline import Carried, Stages

KIND = "carry"


@dataclass(frozen=True)
class Lanes:
    """The lanes of this data-parallel rank among those of the global batch."""

    first: int
    total: int

    @classmethod
    def of(cls, config: RunConfig, data_rank: int) -> "Lanes":
        return cls(config.lanes_per_rank * data_rank, config.train.batch_lanes)


def join_lanes(stages: Stages, carried: Carried) -> dict[str, Tensor]:
    """All carried memory of this rank by name, micro-batches joined along the lanes; empty if nothing is carried."""
    return {leaf.name: leaf.tensor for leaf in _joined_leaves(stages, carried)}


def _joined_leaves(stages: Stages, carried: Carried) -> list[Leaf]:
    joined: list[Leaf] = []
    for stage, states in zip(stages.transformers(), carried, strict=True):
        if any(state is None for state in states):
            continue
        for number, layer_states in zip(stage.layers, zip(*states, strict=True), strict=True):
            leaves = zip(*(name_leaves(state, f"layers.{number}") for state in layer_states), strict=True)
            joined += [each[0]._replace(tensor=torch.cat([leaf.tensor for leaf in each])) for each in leaves]
    return joined


def carry_fragments(stages: Stages, carried: Carried, lanes: Lanes) -> Iterator[Fragment]:
    """What this rank writes of the carried memory."""
    for leaf in _joined_leaves(stages, carried):
        place = _place(stages, leaf, lanes)
        if place.owned and stages.place.context[0] == 0:
            yield Fragment(leaf.name, KIND, place.global_shape, place.start, place.shape, 0, leaf.tensor.flatten())


def read_carried(stages: Stages, template: Carried, lanes: Lanes, checkpoint: Checkpoint) -> Carried:
    """The carried memory of a checkpoint in the form of `template`, which stays where nothing was stored."""
    leaves = _joined_leaves(stages, template)
    if not leaves or not checkpoint.names(KIND):
        return template
    wanted = [Wanted(leaf.name, KIND, *_place(stages, leaf, lanes)[:3], 0, leaf.tensor.numel()) for leaf in leaves]
    stored = {piece.name: values.view(piece.shape) for piece, values in checkpoint.read(wanted)}
    rebuilt = []
    for stage, states in zip(stages.transformers(), template, strict=True):
        parts = {name: value.chunk(len(states)) for name, value in stored.items()}
        rebuilt.append(
            tuple(
                tuple(
                    rebuild(
                        layer_state,
                        f"layers.{number}",
                        lambda name, like, index=index, parts=parts: parts[name][index].to(like),
                    )
                    for number, layer_state in zip(stage.layers, state or (), strict=True)
                )
                for index, state in enumerate(states)
            )
        )
    return tuple(rebuilt)


def _place(stages: Stages, leaf: Leaf, lanes: Lanes) -> Slice:
    """Where a leaf of this rank lies in the global tensor; lanes are its first dimension, to be joined along."""
    assert leaf.dims[0] == LANES, f"{leaf.name}: its first dimension must be that of the lanes"
    copies = max(1, stages.parallel.tensor_size // stages.model.kv_heads)
    dim = leaf.dims.index(KV_HEADS) if KV_HEADS in leaf.dims else None
    piece = divide(tuple(leaf.tensor.shape), dim, copies)
    return piece._replace(global_shape=(lanes.total, *piece.global_shape[1:]), start=(lanes.first, *piece.start[1:]))
