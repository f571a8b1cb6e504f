"""Carried memory as named pieces of global tensors, so that a checkpoint fits any layout and any micro-batches.

A leaf of a state is named after its layer and fields; its shape suffix tells how it is divided: B (always first) over
the lanes, K (key-value heads) over the tensor-parallel ranks. All context-parallel ranks carry the same memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infini_train.checkpoint.fragments import Fragment, Wanted
from infini_train.checkpoint.reader import Checkpoint
from infini_train.config.run import RunConfig
from infini_train.model.slices import divide
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


def name_leaves(state: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested (Named)tuples with dotted names, in a fixed order."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    fields = getattr(state, "_fields", range(len(state)))
    for field, value in zip(fields, state, strict=True):
        yield from name_leaves(value, f"{prefix}.{field}")


def join_lanes(stages: Stages, carried: Carried) -> dict[str, Tensor]:
    """All carried memory of this rank by name, micro-batches joined along the lanes; empty if nothing is carried."""
    joined: dict[str, Tensor] = {}
    for stage, states in zip(stages.transformers(), carried, strict=True):
        if any(state is None for state in states):
            continue
        for number, layer_states in zip(stage.layers, zip(*states, strict=True), strict=True):
            leaves = [dict(name_leaves(state, f"layers.{number}")) for state in layer_states]
            joined |= {name: torch.cat([each[name] for each in leaves]) for name in leaves[0]}
    return joined


def carry_fragments(stages: Stages, carried: Carried, lanes: Lanes) -> Iterator[Fragment]:
    """What this rank writes of the carried memory."""
    for name, value in join_lanes(stages, carried).items():
        global_shape, start, shape, owned = _place(stages, name, tuple(value.shape), lanes)
        if owned and stages.place.context[0] == 0:
            yield Fragment(name, KIND, global_shape, start, shape, 0, value.flatten())


def read_carried(stages: Stages, template: Carried, lanes: Lanes, checkpoint: Checkpoint) -> Carried:
    """The carried memory of a checkpoint in the form of `template`, which stays where nothing was stored."""
    leaves = join_lanes(stages, template)
    if not leaves or not checkpoint.names(KIND):
        return template
    wanted = []
    for name, value in leaves.items():
        global_shape, start, shape, _ = _place(stages, name, tuple(value.shape), lanes)
        wanted.append(Wanted(name, KIND, global_shape, start, shape, 0, value.numel()))
    stored = {piece.name: values.view(piece.shape) for piece, values in checkpoint.read(wanted)}
    rebuilt = []
    for stage, states in zip(stages.transformers(), template, strict=True):
        parts = {name: value.chunk(len(states)) for name, value in stored.items()}
        rebuilt.append(
            tuple(
                tuple(
                    _rebuild(layer_state, f"layers.{number}", index, parts)
                    for number, layer_state in zip(stage.layers, state or (), strict=True)
                )
                for index, state in enumerate(states)
            )
        )
    return tuple(rebuilt)


def _place(
    stages: Stages, name: str, shape: tuple[int, ...], lanes: Lanes
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    """(global shape, start, shape, owned by this tensor-parallel rank) of a leaf."""
    letters = name.rsplit("_", 1)[1]
    assert len(letters) == len(shape) and letters[0] == "B", f"{name}: its suffix does not tell its {len(shape)} sizes"
    copies = max(1, stages.parallel.tensor_size // stages.model.kv_heads)
    piece = divide(shape, letters.index("K") if "K" in letters else None, copies)
    return (lanes.total, *piece.global_shape[1:]), (lanes.first, *piece.start[1:]), piece.shape, piece.owned


def _rebuild(template: Any, prefix: str, index: int, parts: dict[str, tuple[Tensor, ...]]) -> Any:
    if isinstance(template, Tensor):
        return parts[prefix][index].to(device=template.device, dtype=template.dtype)
    fields = getattr(template, "_fields", range(len(template)))
    values = [_rebuild(value, f"{prefix}.{f}", index, parts) for f, value in zip(fields, template, strict=True)]
    return type(template)(*values) if hasattr(template, "_fields") else tuple(values)
