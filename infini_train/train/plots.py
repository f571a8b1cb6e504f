"""Pictures of a model's memory, for TensorBoard and files.

Legend: L layers with gates, H query heads.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402 (the backend must be chosen first)


def plot_gates(gates_LH: np.ndarray, step: int, layers: Sequence[int]) -> Figure:
    """Heat map of sigmoid(gate): 0 (blue) reads only the segment, 1 (red) only the memory; `layers` are its rows."""
    rows, heads = gates_LH.shape
    figure = Figure(figsize=(1.8 + 0.55 * heads, 1.2 + 0.45 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gates_LH, vmin=0, vmax=1, cmap="coolwarm", aspect="auto")
    axes.set(title=f"share of the memory, step {step}", xlabel="head", ylabel="layer")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(rows), layers)
    if gates_LH.size <= 256:
        for (row, head), gate in np.ndenumerate(gates_LH):
            colour = "white" if abs(gate - 0.5) > 0.35 else "black"
            axes.text(head, row, f"{gate:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes)
    return figure
