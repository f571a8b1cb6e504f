"""Weights of a checkpoint into a model."""

import re

import torch

from infini_train.checkpoint.fragments import Wanted
from infini_train.checkpoint.reader import Checkpoint
from infini_train.model.slices import find_slice
from infini_train.model.transformer import Transformer

OF_A_KIND = re.compile(r".*\.(gate|conv)|memory_tokens\..*")  # parameters that not every kind of attention has


@torch.no_grad()
def load_weights(model: Transformer, checkpoint: Checkpoint) -> list[str]:
    """Fills the parameters of a model, or of this rank's part of it, from a checkpoint's fp32 masters.

    Where the checkpoint is of another kind of attention, gates and memory tokens stay as they are: those of the other
    kind, if there are any, belong to another memory. So does a convolution that the checkpoint's model has not.

    Returns:
        Their names.

    Raises:
        CheckpointError: a parameter is missing or of another shape.
    """
    parameters = dict(model.named_parameters())
    new: list[str] = []
    if checkpoint.attention_kind not in (None, model.config.attention.kind):
        new = [name for name in parameters if OF_A_KIND.fullmatch(name)]
    elif not checkpoint.conv_tokens:
        new = [name for name in parameters if name.endswith(".conv")]
    wanted = [
        Wanted(name, "master", *find_slice(parameter)[:3], 0, parameter.numel())
        for name, parameter in parameters.items()
        if name not in new
    ]
    for piece, values in checkpoint.read(wanted):
        parameter = parameters[piece.name]
        parameter.copy_(values.view_as(parameter))
    return new
