"""Carried memory as named tensors over all lanes, so that a checkpoint fits any division into micro-batches.

Legend: B lanes of the global batch; every leaf of a state has the lanes first.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from infini_train.model.transformer import ModelState
from infini_train.train.step import Carried


def name_leaves(state: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested (Named)tuples with dotted names, in a fixed order."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    fields = getattr(state, "_fields", range(len(state)))
    for field, value in zip(fields, state, strict=True):
        yield from name_leaves(value, f"{prefix}.{field}")


def join_lanes(carried: Carried) -> dict[str, Tensor]:
    """All carried memory by name, micro-batches joined along the lanes; empty if nothing is carried."""
    states = [state for state in carried if state is not None]
    named = [dict(name_leaves(state, "layers")) for state in states]
    return {name: torch.cat([leaves[name] for leaves in named]) for name in (named[0] if named else {})}


def split_lanes(values: dict[str, Tensor], template: ModelState, micro_batches: int) -> Carried:
    """The inverse of `join_lanes`, in the structure of `template` (a state of one micro-batch)."""
    parts = {name: value.chunk(micro_batches) for name, value in values.items()}
    return tuple(_rebuild(template, "layers", index, parts) for index in range(micro_batches))


def _rebuild(template: Any, prefix: str, index: int, parts: dict[str, tuple[Tensor, ...]]) -> Any:
    if isinstance(template, Tensor):
        return parts[prefix][index].to(device=template.device, dtype=template.dtype)
    fields = getattr(template, "_fields", range(len(template)))
    values = [_rebuild(value, f"{prefix}.{f}", index, parts) for f, value in zip(fields, template, strict=True)]
    return type(template)(*values) if hasattr(template, "_fields") else tuple(values)
