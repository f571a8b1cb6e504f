"""Numbers about gates and memories, of all ranks, read off the model and the carried states.

Legend: L layers with gates, H query heads.
"""

import numpy as np
import torch

from infini_train.model.infini import ConvolvedState
from infini_train.model.slices import find_slice
from infini_train.ops.attention import InfiniState
from infini_train.parallel import mesh
from infini_train.parallel.pipeline import Carried, Stages
from infini_train.parallel.zero import Engine


def gate_matrix(stages: Stages, engine: Engine) -> np.ndarray | None:
    """sigmoid(gate) by layer and head, (L, H), in the order of `ModelConfig.gate_layers`; None if there are none.

    All ranks call it together.
    """
    layers = stages.model.gate_layers
    if not layers:
        return None
    gates_LH = np.zeros((len(layers), stages.model.num_heads))
    gates = {name: gate for name, gate in stages.named_globally() if name.endswith(".gate")}
    with engine.gathered(gates.values()):
        for name, gate in gates.items():
            first = find_slice(gate).start[0]
            shares = torch.sigmoid(gate.detach().float()).cpu().numpy()
            gates_LH[layers.index(int(name.split(".")[1])), first : first + len(shares)] = shares
    replicas = stages.place.data[1] * stages.place.context[1]
    return np.array(mesh.sum_over_world(gates_LH.ravel().tolist())).reshape(gates_LH.shape) / replicas


def memory_norms(stages: Stages, states: Carried) -> dict[str, float]:
    """Mean norms of M and z over lanes and heads, a layer each, and the tokens written since the documents' starts.

    Of each rank's last micro-batch; all ranks call it together.
    """
    layers = stages.model.num_layers
    norms = np.zeros((3, layers))
    for stage, micro_batches in zip(stages.transformers(), states, strict=True):
        for number, state in zip(stage.layers, micro_batches[-1] or (), strict=False):
            if isinstance(state, InfiniState | ConvolvedState):
                memory = state.memory
                norms[:, int(number)] = (
                    memory.memory_BKDE.float().norm(dim=(-2, -1)).mean().item(),
                    memory.normaliser_BKD.float().norm(dim=-1).mean().item(),
                    memory.written_B.float().mean().item(),
                )
    holders = stages.place.world[1] // stages.place.pipeline[1]  # ranks that hold a part of each layer
    totals = np.array(mesh.sum_over_world(norms.ravel().tolist())).reshape(norms.shape) / holders
    values = {f"memory/norm/layer {number}": totals[0, number] for number in range(layers)}
    values |= {f"memory/normaliser/layer {number}": totals[1, number] for number in range(layers)}
    return {**values, "memory/written_tokens": totals[2, -1]}
