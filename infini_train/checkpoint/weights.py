"""Weights of a checkpoint into a model."""

import torch

from infini_train.checkpoint.fragments import Wanted
from infini_train.checkpoint.reader import Checkpoint
from infini_train.model.slices import find_slice
from infini_train.model.transformer import Transformer


@torch.no_grad()
def load_weights(model: Transformer, checkpoint: Checkpoint) -> None:
    """Fills the parameters of a model, or of this rank's part of it, from a checkpoint's fp32 masters.

    Raises:
        CheckpointError: a parameter is missing or of another shape.
    """
    parameters = dict(model.named_parameters())
    wanted = [
        Wanted(name, "master", *find_slice(parameter)[:3], 0, parameter.numel())
        for name, parameter in parameters.items()
    ]
    for piece, values in checkpoint.read(wanted):
        parameter = parameters[piece.name]
        parameter.copy_(values.view_as(parameter))
