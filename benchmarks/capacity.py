"""How many key-value pairs a memory holds, without any training: random pairs written and read back.

    python benchmarks/capacity.py

Keys are normal with a standard deviation (scale), independent for each head; values are normal. Pairs are written in
segments of 64 by the project's own ops, then each key is asked for. A pair is recalled if, of all values stored, its
own is nearest in angle to what was read, the heads' readings side by side. Beside the paper's two updates stand the
linear one with sharp features (model.attention.features), and a form that is no option of the models: keys of unit
length, no sigma, no normaliser, a plain sum.
Capacity is the largest number of pairs on the grid up to which at least 90 % are recalled. The result is kept in
benchmarks/results/capacity.json, the picture is docs/images/capacity.png, the table stands in docs/results/capacity.md.
With --report, picture and table are made from the kept result.
"""

import argparse
import json
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402 (the backend must be chosen first)
from page import IMAGES, RESULTS, ResultPage, as_table, keep_result  # noqa: E402

from infini_train.ops.grid import make_grid  # noqa: E402
from infini_train.ops.memory import Form, begin_scan, empty_memory, read_memory  # noqa: E402

SEGMENT = 64
PAIRS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
KEY_DIMS, HEADS, SCALES = (16, 32, 64, 128), (1, 2, 4, 8), (1.0, 2.0, 4.0, 8.0, 16.0)
USUAL = {"key_dim": 32, "heads": 1, "scale": 8.0}
ENOUGH = 0.9
UPDATES = {"linear": "-", "delta": "--", "linear sharp": "-.", "unit keys": ":"}  # and their lines


def main() -> None:
    """Measures unless --report, then draws and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=32, metavar="N", help="memories of each kind")
    parser.add_argument("--report", action="store_true", help="only make the picture and the table")
    options = parser.parse_args()
    if not options.report:
        keep_result("capacity", {"segment_tokens": SEGMENT, "pairs": PAIRS, "rows": measure(options.repeats)})
    draw(load()).savefig(IMAGES / "capacity.png", dpi=150)
    PAGE.write()


def measure(repeats: int) -> list[dict[str, Any]]:
    """A row for each form of memory and each value of what is varied."""
    rows = []
    for name, values in (("key_dim", KEY_DIMS), ("heads", HEADS), ("scale", SCALES)):
        for value in values:
            for update in UPDATES:
                form = {**USUAL, name: value}
                found = [recall(update, pairs, repeats, **form) for pairs in PAIRS]
                rows.append({"varied": name, "update": update, **form, "recalled": found, "capacity": capacity(found)})
                print(f"{name:>8} {value:>5g} {update:>9}  capacity {rows[-1]['capacity']:>5,}", flush=True)
    return rows


def load() -> list[dict[str, Any]]:
    """The rows of the kept result."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "capacity.json").read_text(encoding="utf-8"))["rows"]
    return rows


def recall(update: Any, pairs: int, repeats: int, key_dim: int, heads: int, scale: float) -> float:
    """Share of pairs recalled from a full memory."""
    shape, generator = (repeats, heads, pairs, key_dim), torch.Generator().manual_seed(pairs)  # the same for all forms
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    keys = scale * keys
    read = read_unit(keys, values) if update == "unit keys" else read_back(Form(*update.split()), keys, values)
    read_out, stored = (torch.nn.functional.normalize(x.transpose(1, 2).flatten(2), dim=-1) for x in (read, values))
    nearest = (read_out @ stored.mT).argmax(-1)
    return float((nearest == torch.arange(pairs)).float().mean())


def read_unit(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What comes back by each key from the sum of outer products of unit keys and values."""
    unit = torch.nn.functional.normalize(keys, dim=-1)
    return unit @ (unit.mT @ values)


def read_back(form: Form, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What comes back by each key, (repeats, heads, pairs, value dim), after all pairs were written by Eq. 8 or 9."""
    repeats, heads, pairs, key_dim = keys.shape
    padded = -(-pairs // SEGMENT) * SEGMENT
    weights = torch.zeros(repeats, padded + SEGMENT)
    weights[:, :pairs] = 1
    starts = torch.zeros(weights.shape, dtype=torch.bool)
    starts[:, 0] = True
    grid = make_grid(starts, weights, None, SEGMENT, 0)
    closed = grid.closed * SEGMENT

    def fold(x_BKTD: torch.Tensor) -> torch.Tensor:
        full = torch.nn.functional.pad(x_BKTD, (0, 0, 0, closed - pairs))
        return full.unflatten(2, (grid.closed, SEGMENT)).transpose(1, 2)

    empty = empty_memory(repeats, heads, key_dim, key_dim, keys)
    final = begin_scan(fold(keys), fold(values), empty, grid, form)().final
    entered = begin_scan(fold(keys)[:, :0], fold(values)[:, :0], final, grid._replace(closed=0, segments=1), form)()
    visible = torch.ones(repeats, 1, pairs, dtype=torch.bool)
    return read_memory(keys[:, None], entered, visible, form)[:, 0]


def capacity(recalled: list[float]) -> int:
    """Most pairs up to which enough are recalled."""
    good = [pairs for i, pairs in enumerate(PAIRS) if min(recalled[: i + 1]) >= ENOUGH]
    return max(good, default=0)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A panel for each thing varied: share recalled against pairs."""
    figure = Figure(figsize=(13, 4.3), layout="constrained")
    titles = {"key_dim": "key size", "heads": "heads", "scale": "scale of the keys"}
    for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        values = sorted({row[name] for row in rows if row["varied"] == name})
        for row in (row for row in rows if row["varied"] == name):
            colour = matplotlib.colormaps["viridis"](values.index(row[name]) / len(values))
            label = f"{row[name]:g}" if row["update"] == "linear" else None
            share, style = np.multiply(row["recalled"], 100), UPDATES[row["update"]]
            axes.plot(PAIRS, share, style, color=colour, label=label, marker="o", markersize=3)
        fixed = ", ".join(f"{titles[other]} {value:g}" for other, value in USUAL.items() if other != name)
        axes.set(xscale="log", xlabel="pairs stored", title=f"by {title} ({fixed})")
        axes.title.set_fontsize(9)
        axes.axhline(100 * ENOUGH, linestyle=":", color="black", linewidth=1)
        axes.legend(title=title, fontsize=8)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("recalled (%)")
    figure.suptitle("solid: linear, dashed: delta, dash-dotted: linear sharp, dotted: unit keys without normaliser")
    return figure


def tabulate() -> str:
    """Most pairs recalled to 90 %, by form and what is varied."""
    rows, found = [], load()
    for key_dim, heads, scale in dict.fromkeys((row["key_dim"], row["heads"], row["scale"]) for row in found):
        same = [row for row in found if (row["key_dim"], row["heads"], row["scale"]) == (key_dim, heads, scale)]
        by_update = {row["update"]: str(row["capacity"]) for row in same}
        rows.append([str(key_dim), str(heads), f"{scale:g}", *by_update.values()])
    forms = list(dict.fromkeys(row["update"] for row in found))
    return as_table(["key size", "heads", "scale", *forms[:-1], f"{forms[-1]}, no normaliser"], rows)


PAGE = ResultPage("capacity", "benchmarks/capacity.py", {"capacity": tabulate})


if __name__ == "__main__":
    main()
