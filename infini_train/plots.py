"""Pictures as matplotlib figures: retrieval, loss against context, gates. For files and TensorBoard.

Legend: L lengths, C columns of a retrieval grid, G layers with gates, H query heads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from infini_train.statistics import format_percent

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402 (the backend must be chosen first)
from matplotlib.figure import Figure  # noqa: E402


def plot_retrieval(
    share_LC: np.ndarray,
    interval_LC2: np.ndarray,
    lengths: Sequence[str],
    columns: Sequence[str],
    title: str,
    column_axis: str,
) -> Figure:
    """Heat map of shares in percent, each with its interval below it.

    Args:
        share_LC: 0 to 1; NaN is left blank.
        interval_LC2: low and high end of each.
        lengths: names of the rows.
        columns: names of the columns.
        title: above it all.
        column_axis: what the columns are.
    """
    figure = Figure(figsize=(2.6 + 0.75 * len(columns), 1.7 + 0.55 * len(lengths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * share_LC, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set(xlabel=column_axis, ylabel="tokens")
    axes.set_title(title, fontsize=9)
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > 12 else {}
    axes.set_xticks(range(len(columns)), columns, **slanted)
    axes.set_yticks(range(len(lengths)), lengths)
    for (row, column), share in np.ndenumerate(share_LC):
        if np.isnan(share):
            continue
        low, high = map(format_percent, interval_LC2[row, column])
        text = f"{format_percent(share)}\n{low}\u2013{high}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if share > 0.6 else "white")
    figure.colorbar(image, ax=axes, label="%")
    return figure


def plot_context_losses(results: Mapping[str, Any], title: str) -> Figure:
    """Two panels: loss by tokens since the document's start, and by tokens visible.

    Args:
        results: of `eval.context.summarise`.
        title: above it all.
    """
    contexts = results["contexts"]
    figure = Figure(figsize=(9.5 if contexts else 5.2, 3.8), layout="constrained")
    panels = figure.subplots(1, 2 if contexts else 1, squeeze=False, sharey=True)[0]
    rows = results["positions"]
    middle = [max(row["first_position"], row["end_position"] / 2) * 2**0.5 for row in rows]
    _draw_band(panels[0], middle, rows)
    panels[0].set(xlabel="tokens since the document's start", ylabel="loss (nats a token)")
    if contexts:
        *cut, whole = contexts
        _draw_band(panels[1], [row["context_tokens"] for row in cut], cut)
        panels[1].axhline(whole["loss"], linestyle="--", linewidth=1, color="black", label="all visible")
        panels[1].set(xlabel="tokens visible before the target")
        panels[1].legend(frameon=False)
    figure.suptitle(f"{title}\n95 % intervals: bootstrap over documents", fontsize=9)
    return figure


def _draw_band(axes: Axes, x: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> None:
    """Losses over a logarithmic axis, with their intervals."""
    axes.fill_between(x, *zip(*(row["loss_95"] for row in rows), strict=True), alpha=0.2, linewidth=0)
    axes.plot(x, [row["loss"] for row in rows], marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def plot_gate_history(rows: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Two panels over training: shares of local, mixed and memory heads; mean, lowest and highest gate.

    Args:
        rows: metrics of the steps that have gates, in order.
        title: above it all.
    """
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    shares, gates = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    parts = {"local (gate below 0.1)": "gates/local", "mixed": "gates/mixed", "memory (above 0.9)": "gates/memory"}
    colours = ("tab:blue", "lightgrey", "tab:red")
    values = [[100 * row[name] for row in rows] for name in parts.values()]
    shares.stackplot(steps, *values, labels=list(parts), colors=colours, linewidth=0)
    shares.set(xlabel="step", ylabel="heads (%)", ylim=(0, 100))
    shares.legend(loc="upper left", fontsize=8)
    lowest, highest = ([row[f"gates/{end}"] for row in rows] for end in ("lowest", "highest"))
    gates.fill_between(steps, lowest, highest, alpha=0.2, linewidth=0, label="lowest to highest")
    gates.plot(steps, [row["gates/mean"] for row in rows], marker="o", markersize=3, label="mean")
    for edge in (0.1, 0.9):
        gates.axhline(edge, linestyle=":", linewidth=1, color="black")
    gates.set(xlabel="step", ylabel="gate: share of the memory", ylim=(0, 1))
    gates.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def plot_gate_map(gates_GH: np.ndarray, step: int, layers: Sequence[int]) -> Figure:
    """Heat map of sigmoid(gate): 0 (blue) reads only the segment, 1 (red) only the memory; `layers` are its rows."""
    rows, heads = gates_GH.shape
    figure = Figure(figsize=(1.8 + 0.55 * heads, 1.2 + 0.45 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gates_GH, vmin=0, vmax=1, cmap="coolwarm", aspect="auto")
    axes.set(title=f"share of the memory, step {step}", xlabel="head", ylabel="layer")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(rows), layers)
    if gates_GH.size <= 256:
        for (row, head), gate in np.ndenumerate(gates_GH):
            colour = "white" if abs(gate - 0.5) > 0.35 else "black"
            axes.text(head, row, f"{gate:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes)
    return figure
