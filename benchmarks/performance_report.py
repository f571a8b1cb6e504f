"""The tables and the picture of docs/results/performance.md from what benchmarks/performance.py measured."""

import json
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 (the backend must be chosen first)
from page import IMAGES, RESULTS, ROOT, ResultPage, as_table  # noqa: E402

NAMES = (
    *("linear", "linear, documents", "delta", "gated delta"),
    *("plain loop", "infini-transformer-pytorch", "full attention"),
)
FILE, NOT_RUN = RESULTS / "performance.json", "Not run yet."
Row = dict[str, Any]


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> tuple[float, float]:
    """How many times as long as `fast` `slow` takes, by round: the median, and the spread of the middle half."""
    ratios = sorted(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    quarter = len(ratios) // 4
    return statistics.median(ratios), ratios[-1 - quarter] - ratios[quarter]


def write_report() -> None:
    """Writes the tables into the page, and the picture."""
    image = IMAGES / "performance.png"
    draw(load()["layers"]).savefig(image, dpi=150)
    print(f"written: {image.relative_to(ROOT)}")
    PAGE.write()


def load() -> Row:
    """What was measured last."""
    found: Row = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def name_shape(row: Row) -> list[str]:
    """Its first cells."""
    return [f"{row['tokens'] // 1024}K", str(row["segment_tokens"]), str(row["head_size"]), row["precision"]]


def tabulate_times(found: Row) -> str:
    """Milliseconds of a forward and backward, and the linear layer's share of the matmul peak."""
    rows = []
    for row in found["layers"]:
        medians = {name: statistics.median(of) for name, of in row["seconds"].items()}
        share = row["product_flops"] / medians["linear"] / row["peak_flops"]
        cells = [f"{1e3 * medians[name]:,.0f}" if name in medians else "" for name in NAMES]
        rows.append([*name_shape(row), *cells, f"{100 * share:.0f} %"])
    return as_table(["tokens", "segment", "head", "precision", *NAMES, "linear, of the matmul peak"], rows)


def tabulate_ratios(found: Row) -> str:
    """How many times as fast as others."""
    pairs = (
        ("plain loop", "linear"),
        ("infini-transformer-pytorch", "linear"),
        ("full attention", "linear"),
        ("delta", "linear"),
        ("gated delta", "linear"),
        ("linear, documents", "linear"),
    )
    rows = []
    for row in found["layers"]:
        cells = []
        for slow, fast in pairs:
            middle, spread = ratio(row["seconds"], slow, fast) if slow in row["seconds"] else (None, None)
            cells.append("" if middle is None else f"{middle:.2f} ± {spread / 2:.2f}")
        rows.append([*name_shape(row), *cells])
    return as_table(["tokens", "segment", "head", "precision", *(slow for slow, _ in pairs)], rows)


def tabulate_memory(found: Row) -> str:
    """Peak memory of a forward and backward."""
    peaks: dict[str, dict[int, int]] = {}
    for row in found["memory"]:
        peaks.setdefault(row["layer"], {})[row["tokens"]] = row["bytes"]
    lengths = sorted({tokens for by_length in peaks.values() for tokens in by_length})
    rows = [
        [layer, *(f"{of[n] / 2**20:,.0f} MB, {of[n] / n / 1024:.1f} KB a token" if n in of else "" for n in lengths)]
        for layer, of in peaks.items()
    ]
    return as_table(["layer", *(f"{tokens // 1024}K tokens" for tokens in lengths)], rows)


def tabulate_step(found: Row) -> str:
    """A training step beside a bare loop."""
    step = found["step"]
    middle, spread = ratio(step["seconds"], "framework", "bare loop")
    medians = {name: statistics.median(of) for name, of in step["seconds"].items()}
    row = [f"{step['tokens']:,}", *(f"{medians[name]:.2f} s" for name in ("framework", "bare loop"))]
    return as_table(["tokens", "the framework", "a bare loop", "ratio"], [[*row, f"{middle:.3f} ± {spread / 2:.3f}"]])


def draw(layers: list[Row]) -> pyplot.Figure:
    """Times of the layers by length, of the shape that was measured at most lengths."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    usual = [row for row in layers if (row["segment_tokens"], row["precision"]) == (512, "fp32")]
    for name in NAMES:
        points = [
            (row["tokens"], row["tokens"] / statistics.median(row["seconds"][name]))
            for row in usual
            if name in row["seconds"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xscale="log", xlabel="tokens", ylabel="tokens a second, forward and backward of one layer")
    axes.set_xticks([row["tokens"] for row in usual], [f"{row['tokens'] // 1024}K" for row in usual])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def render(tabulate: Callable[[Row], str]) -> Callable[[], str]:
    """A block of the page."""
    return lambda: tabulate(load()) if FILE.exists() else NOT_RUN


PAGE = ResultPage(
    "performance",
    "benchmarks/performance.py",
    {
        "times": render(tabulate_times),
        "ratios": render(tabulate_ratios),
        "memory": render(tabulate_memory),
        "step": render(tabulate_step),
    },
)


if __name__ == "__main__":
    PAGE.main(__doc__)
