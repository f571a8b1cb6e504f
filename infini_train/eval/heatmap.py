"""Pictures of retrieval: how much came back, by length and by position.

Legend: L lengths, P positions.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np

from infini_train.eval.intervals import format_percent

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402 (the backend must be chosen first)


def plot_recall(
    share_LP: np.ndarray,
    interval_LP2: np.ndarray,
    lengths: Sequence[str],
    positions: Sequence[str],
    title: str,
    axis: str = "position of the key (0 start, 1 end)",
) -> Figure:
    """Heat map of shares in percent, each with its interval below it.

    Args:
        share_LP: 0 to 1; NaN is left blank.
        interval_LP2: low and high end of each.
        lengths: names of the rows.
        positions: names of the columns.
        title: above it all.
        axis: what the columns are.
    """
    figure = Figure(figsize=(2.6 + 0.75 * len(positions), 1.7 + 0.55 * len(lengths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * share_LP, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set(xlabel=axis, ylabel="tokens")
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(positions)), positions)
    axes.set_yticks(range(len(lengths)), lengths)
    for (row, column), share in np.ndenumerate(share_LP):
        if np.isnan(share):
            continue
        low, high = map(format_percent, interval_LP2[row, column])
        text = f"{format_percent(share)}\n{low}\u2013{high}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if share > 0.6 else "white")
    figure.colorbar(image, ax=axes, label="%")
    return figure
