"""Weights of a checkpoint into a model."""

import re

import torch
from torch import Tensor

from infini_train.checkpoint.fragments import Wanted
from infini_train.checkpoint.reader import Checkpoint
from infini_train.model.parameters import traits_of
from infini_train.model.slices import find_slice
from infini_train.model.transformer import Transformer


@torch.no_grad()
def load_weights(model: Transformer, checkpoint: Checkpoint) -> list[str]:
    """Fills the parameters of a model, or of this rank's part of it, from a checkpoint's fp32 masters.

    Where the checkpoint is of another kind of attention, the parameters that a model owes to its kind stay as they are:
    those of the other kind, if there are any, belong to another memory. So do parameters that the model owes to a field
    of the attention with another value in the checkpoint, such as a convolution.

    Returns:
        Their names.

    Raises:
        CheckpointError: a parameter is missing or of another shape.
    """
    parameters = dict(model.named_parameters())
    stored = frozenset(checkpoint.names("master"))
    added = [name for name, parameter in parameters.items() if _is_added(name, parameter, model, checkpoint, stored)]
    wanted = [
        Wanted(name, "master", *find_slice(parameter)[:3], 0, parameter.numel())
        for name, parameter in parameters.items()
        if name not in added
    ]
    for piece, values in checkpoint.read(wanted):
        parameter = parameters[piece.name]
        parameter.copy_(values.view_as(parameter))
    return added


def _is_added(name: str, parameter: Tensor, model: Transformer, checkpoint: Checkpoint, stored: frozenset[str]) -> bool:
    """Whether the checkpoint's layer has another kind, or its attention another value in the parameter's field."""
    traits = traits_of(parameter)
    if traits is None or traits.field is None:
        return False
    number = re.match(r"layers\.(\d+)\.", name)
    mine = model.config.attention if number is None else model.config.layers[int(number[1])]
    theirs = checkpoint.attention_fields(None if number is None else int(number[1]))
    if theirs.get("kind") not in (None, mine.kind):
        return True
    return name not in stored and theirs.get(traits.field) != getattr(mine, traits.field)
