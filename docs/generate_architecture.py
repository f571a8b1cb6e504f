"""Draws docs/images/batch_to_loss.png, how a batch becomes a loss: python docs/generate_architecture.py."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402 (the backend must be chosen first)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle  # noqa: E402

PICTURE = Path(__file__).resolve().parent / "images" / "batch_to_loss.png"
WIDTH, HEIGHT = 160, 100  # of the drawing, in its own units
INK, FAINT, STATE, BOX = "#222222", "#777777", "#c25b12", "#eef2f7"
DOCUMENTS = ("#9ecae1", "#c7e9c0", "#fdd0a2", "#dadaeb", "#fcbba1", "#d9d9d9")
LANES = ((0,) * 10 + (1,) * 6, (2,) * 16, (3,) * 5 + (4,) * 11, (0,) * 16)  # document of each token
TOKENS, SEGMENT = 16, 4


def main() -> None:
    """Writes the picture."""
    draw().savefig(PICTURE, dpi=130)


def draw() -> Figure:
    """The batch, the way of a micro-batch through the model, and a close-up of one layer."""
    figure = Figure(figsize=(13.6, 8.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    draw_batch(axes)
    draw_model(axes)
    draw_layer(axes)
    return figure


def write(axes: Axes, x: float, y: float, text: str, size: float = 11, **style: str) -> None:
    """Text centred on a point."""
    axes.text(x, y, text, **{"fontsize": size, "ha": "center", "va": "center", "color": INK, **style})


def point(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, style: str = "-"
) -> None:
    """An arrow."""
    line = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=line)


def frame(axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str = BOX) -> None:
    """A rounded box."""
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=1", fc=colour, ec=INK, lw=1.1))


def measure(axes: Axes, left: float, right: float, y: float, text: str) -> None:
    """A dimension line with its text above."""
    axes.annotate(
        "", (left, y), (right, y), arrowprops={"arrowstyle": "<->", "color": FAINT, "shrinkA": 0, "shrinkB": 0}
    )
    write(axes, (left + right) / 2, y + 1.8, text, 10, color=FAINT)


def draw_batch(axes: Axes) -> None:
    """Lanes of documents, cut into segments; two of them are a micro-batch."""
    left, bottom, cell, row = 10.0, 64.0, 2.2, 4.6
    right = left + TOKENS * cell
    write(axes, left - 8, 97, "1  The batch", 15, weight="bold", ha="left")
    write(axes, left - 8, 94, "data/lanes.py", 10, family="monospace", color=FAINT, ha="left")
    for lane, documents in enumerate(LANES):
        y = bottom + (len(LANES) - 1 - lane) * row
        for token, document in enumerate(documents):
            colour = DOCUMENTS[document if lane < 3 else 5]
            axes.add_patch(Rectangle((left + token * cell, y), cell, row - 1.2, fc=colour, ec="white", lw=0.8))
            if token and documents[token - 1] != document:
                x = left + token * cell
                axes.add_patch(Polygon([(x, y + 0.6), (x, y + 2.8), (x + 1.6, y + 1.7)], fc=INK))
        for segment in range(TOKENS // SEGMENT + 1):
            x = left + segment * SEGMENT * cell
            axes.plot((x, x), (y - 0.3, y + row - 0.9), color=INK, lw=1.6)
        write(axes, left - 1.2, y + 1.7, f"lane {lane}", 10, ha="right")
    top = bottom + len(LANES) * row
    measure(axes, left, right, top + 3.6, "window = sequence length")
    measure(axes, left, left + SEGMENT * cell, top, "segment")
    write(axes, left + 1.5 * SEGMENT * cell + 13, top + 1.2, "colour: document;  ▶ document start", 9.5, color=FAINT)
    y = bottom + 2 * row - 0.6
    axes.plot((right + 0.8, right + 2, right + 2, right + 0.8), (y, y, top - 0.8, top - 0.8), color=INK, lw=1.4)
    lines = (
        "lane = sequence in the batch; a document goes on",
        "in the lane's next window. Per token: id, label",
        "(next token), document start, write weight",
    )
    write(axes, 2, bottom - 5, "\n".join(lines), 10, ha="left")


def draw_model(axes: Axes) -> None:
    """From a micro-batch through the layers to the loss, and the way back."""
    y, height = 70.0, 12.0
    middle = y + height / 2
    write(axes, 55, 97, "2  One micro-batch, forward and backward", 15, weight="bold", ha="left")
    write(axes, 55, 94, "parallel/pipeline.py, model/transformer.py", 10, family="monospace", color=FAINT, ha="left")
    write(axes, 51.5, middle + 4.2, "micro-\nbatch", 10)
    point(axes, (47.5, middle), (57, middle))
    frame(axes, (57, y), (13, height))
    write(axes, 63.5, middle, "embedding")
    point(axes, (70, middle), (76, middle))
    for shift in (2.4, 1.2, 0):
        frame(axes, (76 + shift, y + shift), (19, height), "#dce6f2")
    write(axes, 85.5, middle, "layers 1 ... N:\nattention, MLP")
    point(axes, (97.6, middle), (104, middle))
    frame(axes, (104, y), (12, height))
    write(axes, 110, middle, "norm, head:\nlogits")
    point(axes, (116, middle), (122, middle))
    frame(axes, (122, y), (14, height))
    write(axes, 129, middle, "cross-entropy\nwith labels")
    point(axes, (136, middle), (141, middle))
    frame(axes, (141, y), (17, height), "#fff3c4")
    write(axes, 149.5, middle + 2.2, "loss", 14, weight="bold")
    write(axes, 149.5, middle - 2.4, "mean over labels of\nthe step, all ranks", 9.5)
    point(axes, (149.5, y + height + 4.5), (63.5, y + height + 4.5), FAINT, "--")
    write(axes, 113, y + height + 6.4, "backward: through all segments of the window", 10.5, color=FAINT)
    frame(axes, (129, 56.5), (29, 8.5), "white")
    write(
        axes,
        143.5,
        60.8,
        "clip, AdamW (parallel/zero.py),\nthen counters, data position and\nstate advance together",
        9.5,
    )
    point(axes, (149.5, y), (149.5, 65))
    point(axes, (72, 60.8), (80, 69.6), STATE)
    write(axes, 71, 58.6, "state of these lanes from the\nprevious window (no gradient)", 10, color=STATE)
    point(axes, (91, 69.6), (104, 60.8), STATE)
    write(axes, 107, 58.6, "state for the next\nwindow (detached)", 10, color=STATE)


def draw_layer(axes: Axes) -> None:
    """A lane in one Infini-attention layer: local attention in each segment, memory from segment to segment."""
    left, bottom, wide, gap = 25.0, 21.0, 20.0, 12.0
    axes.add_patch(FancyBboxPatch((2, 2), 156, 52, boxstyle="round,pad=0,rounding_size=1.5", fc="none", ec=FAINT, lw=1))
    axes.add_patch(Polygon([(76, 70), (95, 70), (150, 54), (10, 54)], fc="#dce6f2", alpha=0.25, lw=0, zorder=0))
    write(axes, 5, 51, "3  Inside a layer: one lane, Infini-attention", 15, weight="bold", ha="left")
    files = "ops/grid.py (who sees whom, once for all layers), ops/attention.py, ops/memory.py"
    write(axes, 68, 51, files, 10, family="monospace", color=FAINT, ha="left")
    for segment in range(4):
        x = left + segment * (wide + gap)
        draw_segment(axes, x, bottom, wide)
        write(axes, x + wide / 2, bottom - 1.6, f"segment {segment}", 10.5)
        frame(axes, (x - 10.5, 7), (9, 8), "#fbe3d0")
        write(axes, x - 6, 11, "M, z", 11, color=STATE)
        point(axes, (x - 6, 15), (x - 6, 41.5), STATE)
        axes.plot((x - 6, x + 1), (41.5, 41.5), color=STATE, lw=1.6)
        point(axes, (x, 41.5), (x + 2, 41.5), STATE)
        point(axes, (x + wide / 2, bottom - 3.2), (x + wide / 2, 12.4))
        point(axes, (x - 1.5, 11), (x + wide + 1.5, 11), STATE)
    end = left + 4 * (wide + gap)
    frame(axes, (end - 10.5, 7), (9, 8), "#fbe3d0")
    write(axes, end - 6, 11, "M, z", 11, color=STATE)
    point(axes, (8, 11), (14.5, 11), STATE)
    write(axes, 8.6, 15.4, "carried\nin", 10, color=STATE)
    write(axes, end - 6, 18.2, "carried out", 10, color=STATE)
    write(axes, 12.3, 30, "read\nsigma(Q) M\n/ sigma(Q) z", 9.5, color=STATE)
    write(axes, left + wide / 2, 8.2, "write sigma(K)ᵀ V", 9.5, color=STATE)
    write(axes, left + wide + gap + wide / 2, 8.2, "linear or delta rule", 9.5, color=STATE)
    note = "Matrix M and normaliser z have a fixed size. A document start empties them; attention never crosses it."
    write(axes, 80, 4.4, note, 10, color=FAINT)
    write(axes, left - 0.6, bottom + 5.5, "queries ↓", 9, color=FAINT)
    write(axes, left + wide / 2 + 9.4, bottom + 9.6, "keys →", 9, color=FAINT)
    write(axes, left + wide / 2 + 6.2, bottom - 4.7, "keys, values", 9.5)
    write(axes, end - 9.6, 46.6, "to the output projection", 10)


def draw_segment(axes: Axes, left: float, bottom: float, wide: float) -> None:
    """Causal attention inside the segment, and the gate that mixes it with what was read from memory."""
    side = 11.0 / SEGMENT
    x = left + (wide - 11) / 2
    for query in range(SEGMENT):
        for key in range(SEGMENT):
            colour = "#6baed6" if key <= query else "#f4f4f4"
            corner = (x + key * side, bottom + (SEGMENT - 1 - query) * side)
            axes.add_patch(Rectangle(corner, side, side, fc=colour, ec="white", lw=1))
    write(axes, left + wide / 2, bottom + 12.4, "causal softmax inside", 9.5)
    point(axes, (left + wide / 2, bottom + 13.6), (left + wide / 2, 38.2))
    frame(axes, (left + 2, 38.2), (wide - 4, 6.4))
    write(axes, left + wide / 2, 41.4, "gate: g · memory\n+ (1 - g) · local", 9.5)
    point(axes, (left + wide / 2, 44.6), (left + wide / 2, 47.4))


if __name__ == "__main__":
    main()
