"""Figures of gates and memories for metrics, over all ranks, read off the model and its states.

Legend: L layers with gates, H query heads.
"""

import numpy as np
import torch

from infini_train.model.parameters import is_gate
from infini_train.model.slices import find_slice
from infini_train.model.variants import mixer_class
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
    gates = [
        (layers.index(int(number)), parameter)
        for stage in stages.transformers()
        for number, layer in stage.layers.items()
        for parameter in layer.parameters()
        if is_gate(parameter)
    ]
    with engine.gathered(gate for _, gate in gates):
        for row, gate in gates:
            first = find_slice(gate).start[0]
            shares = torch.sigmoid(gate.detach().float()).cpu().numpy()
            gates_LH[row, first : first + len(shares)] = shares
    replicas = stages.place.data[1] * stages.place.context[1]
    return np.array(mesh.sum_over_world(gates_LH.ravel().tolist())).reshape(gates_LH.shape) / replicas


def memory_figures(stages: Stages, states: Carried) -> dict[str, float]:
    """What each layer's attention measures in its state (`SequenceMixer.figures`), such as the norms of M and z.

    Of each rank's last micro-batch, averaged over ranks; all ranks call it together.
    """
    layers = enumerate(stages.model.layers)
    values = {(layer, figure): 0.0 for layer, variant in layers for figure in mixer_class(variant).figures}
    for stage, micro_batches in zip(stages.transformers(), states, strict=True):
        for (number, layer), state in zip(stage.layers.items(), micro_batches[-1] or (), strict=False):
            mixer = layer.attention
            if state is not None:
                values |= {(int(number), f): v for f, v in zip(mixer.figures, mixer.measure(state), strict=True)}
    holders = stages.place.world[1] // stages.place.pipeline[1]  # ranks that hold a part of each layer
    totals = mesh.sum_over_world(list(values.values())) if values else []
    found = {}
    for (layer, figure), total in zip(values, totals, strict=True):
        found[f"memory/{figure.name}" + (f"/layer {layer}" if figure.per_layer else "")] = total / holders
    return found
