"""Keeps context tests, and makes the tables and the picture of docs/results/context.md.

    infini-train eval context runs/table2/local-6e-3-0 --data runs/table2/data/test-10x100000 \\
        --contexts 64 256 1K 4K --out local
    python benchmarks/context.py local

Each folder's results become a file in benchmarks/results/context/, named after the folder. Without folders, only the
tables and the picture are made.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402 (the backend must be chosen first)
from page import IMAGES, RESULTS, ResultPage, as_table, keep_result, load_results, without_paths  # noqa: E402

from infini_train.command_line import format_length  # noqa: E402

PLAN = (
    *("data_sha256", "documents", "segment_tokens", "precision"),
    *("contexts_tokens", "targets", "target_tokens", "seed"),
)

Found = dict[str, dict[str, Any]]


def main() -> None:
    """Keeps results, then writes the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="of context tests, with results.json")
    folders = parser.parse_args().folders
    for folder in folders:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        keep_result(f"context/{folder.resolve().name}", without_paths(found))
    everything = load()
    if not everything:
        parser.error(f"{RESULTS / 'context'} holds no results; give folders of `infini-train eval context`")
    check_alike(everything, parser)
    draw(everything).savefig(IMAGES / "context_arms.png", dpi=150)
    PAGE.write()


def load() -> Found:
    """All kept tests, by name."""
    return load_results("context")


def check_alike(found: Found, parser: argparse.ArgumentParser) -> None:
    """One table holds tests of the same books and targets only."""
    plans = {name: {field: test[field] for field in PLAN} for name, test in found.items()}
    first, *others = plans
    for name in others:
        for field in PLAN:
            if plans[name][field] != plans[first][field]:
                file = RESULTS / "context" / f"{name}.json"
                parser.error(f"{file}: other {field} than {first}.json; test both alike, or remove one")


def tabulate_positions(found: Found) -> str:
    """Loss by tokens since the book's start, a row per arm."""
    places = next(iter(found.values()))["positions"]
    head = ["loss at tokens", *(f"from {format_place(place['first_position'])}" for place in places), "whole books"]
    rows = [
        [arm, *(f"{place['loss']:.3f}" for place in test["positions"]), f"{test['whole']['loss']:.4f}"]
        for arm, test in found.items()
    ]
    return as_table(head, rows)


def tabulate_contexts(found: Found) -> str:
    """How much higher the loss is with less context visible, a row per arm; intervals by bootstrap over books."""
    seen = next(iter(found.values()))["contexts"]
    head = ["visible before a target", *(format_visible(context) for context in seen)]
    rows = []
    for arm, test in found.items():
        cells = [format_loss(context) for context in test["contexts"] if context["context_tokens"]]
        rows.append([arm, *cells, f"{test['contexts'][-1]['loss']:.4f}"])
    return as_table(head, rows)


def format_loss(context: dict[str, Any]) -> str:
    low, high = context["above_all_95"]
    return f"{context['above_all']:+.3f} ({low:+.3f} to {high:+.3f})"


def format_place(tokens: int) -> str:
    return format_length(tokens) if tokens else "0"


def format_visible(context: dict[str, Any]) -> str:
    tokens = context["context_tokens"]
    return format_length(tokens) if tokens else "all: loss"


def draw(found: Found) -> Figure:
    """Loss by position, and by visible context."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, test in found.items():
        middles = [(max(place["first_position"], 32) * place["end_position"]) ** 0.5 for place in test["positions"]]
        left.plot(middles, [place["loss"] for place in test["positions"]], marker="o", markersize=3, label=arm)
        limited = [context for context in test["contexts"] if context["context_tokens"]]
        (line,) = right.plot(
            [context["context_tokens"] for context in limited], [context["loss"] for context in limited], marker="o"
        )
        right.axhline(test["contexts"][-1]["loss"], color=line.get_color(), linestyle=":", linewidth=1)
    left.set(xscale="log", xlabel="tokens since the book's start", ylabel="loss (nats per token)")
    right.set(xscale="log", xlabel="tokens visible before a target (dotted: all)", ylabel="loss of the targets")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


PAGE = ResultPage(
    "context",
    "benchmarks/context.py",
    {
        "loss by position": lambda: tabulate_positions(load()),
        "loss by visible context": lambda: tabulate_contexts(load()),
    },
)


if __name__ == "__main__":
    main()
