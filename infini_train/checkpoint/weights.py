"""Weights of a checkpoint into a model."""

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
    same_kind = checkpoint.attention_kind in (None, model.config.attention.kind)
    stored = frozenset(checkpoint.names("master"))
    added = [
        name
        for name, parameter in parameters.items()
        if (field := _field_of(parameter)) is not None
        and (
            not same_kind
            or (name not in stored and checkpoint.attention_field(field) != getattr(model.config.attention, field))
        )
    ]
    wanted = [
        Wanted(name, "master", *find_slice(parameter)[:3], 0, parameter.numel())
        for name, parameter in parameters.items()
        if name not in added
    ]
    for piece, values in checkpoint.read(wanted):
        parameter = parameters[piece.name]
        parameter.copy_(values.view_as(parameter))
    return added


def _field_of(parameter: Tensor) -> str | None:
    traits = traits_of(parameter)
    return None if traits is None else traits.field
