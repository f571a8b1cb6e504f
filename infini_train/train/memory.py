"""Numbers about gates and memories, read off the model and the carried states.

Legend: L layers, H query heads, B lanes, K key-value heads, D key size, E value size.
"""

import numpy as np
import torch

from infini_train.model.transformer import Transformer
from infini_train.ops.attention import InfiniState
from infini_train.train.step import Carried


def gate_matrix(model: Transformer) -> np.ndarray | None:
    """sigmoid(beta) by layer and head, (L, H); None for a variant without gates."""
    gates = [layer.attention.gate for layer in model.layers if hasattr(layer.attention, "gate")]
    return torch.stack([torch.sigmoid(gate.detach().float()) for gate in gates]).cpu().numpy() if gates else None


def memory_norms(states: Carried) -> dict[str, float]:
    """Mean norms of M and z over lanes and heads, a layer each, and the tokens written since the documents' starts."""
    values: dict[str, float] = {}
    layers = states[-1] or ()
    for index, state in enumerate(layers):
        if isinstance(state, InfiniState):
            memory = state.memory
            values[f"memory/norm/layer {index}"] = memory.memory_BKDE.float().norm(dim=(-2, -1)).mean().item()
            values[f"memory/normaliser/layer {index}"] = memory.normaliser_BKD.float().norm(dim=-1).mean().item()
            values["memory/written_tokens"] = memory.written_B.float().mean().item()
    return values
