"""The tables and the plot of docs/results/table2.md from the files of benchmarks/table2.py.

Those of benchmarks/results/table2_short/ are of an earlier, shorter training (commit e6ac4cb), which also tried other
sizes of the memories; nothing makes them any more.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 (the backend must be chosen first)
from page import IMAGES, ROOT, ResultPage, as_table, load_results  # noqa: E402

from infini_train.statistics import bootstrap_ratio  # noqa: E402

ORDER = (
    "infini-linear",
    "infini-delta",
    "infini-gated",
    "mixed",
    "transformer_xl",
    "memorizing",
    "rmt",
    "local",
    "full",
    "local-conv",
    "window-conv",
    "infini-linear-conv",
    "infini-gated-conv",
)
COLOURS = dict(zip(ORDER, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
BASELINES = ("transformer_xl", "memorizing", "local")  # what the others are compared with, book by book
REFERENCE = "memorizing"  # whose memory the others are compared with, as in the paper

Found = dict[str, Any]


def write_report() -> None:
    """Writes the tables into the page, and the plot."""
    if found := load("table2_short"):
        image = IMAGES / "table2_memory.png"
        draw(found, image)
        print(f"written: {image.relative_to(ROOT)}")
    PAGE.write()


def load(folder: str = "table2") -> list[Found]:
    """All runs, in the order of the arms."""
    found = [{"size": "", **run} for run in load_results(folder).values()]
    return sorted(found, key=lambda run: (ORDER.index(run["arm"]), run["size"], run["rate"], run["seed"]))


def best_rate(found: list[Found], arm: str) -> str:
    """The rate with the lowest loss on the validation books, with the first seed."""
    tried = [run for run in found if run["arm"] == arm and not run["size"] and run["seed"] == 0]
    rate: str = min(tried, key=lambda run: run["validation"]["loss"])["rate"]
    return rate


def chosen(found: list[Found], arm: str) -> list[Found]:
    """The runs of an arm with its own memory size and its best rate, one per seed."""
    rate = best_rate(found, arm)
    return [run for run in found if run["arm"] == arm and not run["size"] and run["rate"] == rate]


def arms_of(found: list[Found]) -> list[str]:
    """The arms that have a run, in order."""
    return [arm for arm in ORDER if any(run["arm"] == arm and not run["size"] for run in found)]


def tabulate_arms(found: list[Found]) -> str:
    """A row per arm: means over its seeds."""
    reference = [run["memory_numbers"] for run in found if run["arm"] == REFERENCE and not run["size"]]
    head = ["arm", "seeds", "perplexity of the test books", "loss (nats per token), range over seeds"]
    head += [
        "memory (numbers)",
        "compression",
        "carried (bytes)",
        "tokens per CPU second",
        "peak RSS (MB)",
        "parameters",
    ]
    rows = []
    for arm in arms_of(found):
        runs = chosen(found, arm)
        losses = [run["test"]["loss"] for run in runs]
        speeds = [run["train_tokens_per_cpu_s"] for run in runs if run["train_tokens_per_cpu_s"]]
        numbers = runs[0]["memory_numbers"]
        spread = f", {min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else ""
        rows.append(
            [
                *(arm, str(len(runs)), f"{statistics.mean(run['test']['perplexity'] for run in runs):.2f}"),
                *(f"{statistics.mean(losses):.4f}{spread}", f"{numbers:,}"),
                f"{reference[0] / numbers:.1f}x" if reference and numbers else "-",
                f"{runs[0]['carried_bytes']:,}",
                f"{statistics.mean(speeds) if speeds else float('nan'):,.0f}",
                f"{max(run['train_peak_rss_bytes'] for run in runs) / 2**20:,.0f}",
                f"{runs[0]['parameters']:,}",
            ]
        )
    return as_table(head, rows)


def tabulate_differences(found: list[Found]) -> str:
    """A row per arm and seed: how much lower its loss is than the baselines' with the same seed, by books."""
    rows = []
    for arm in arms_of(found):
        for run in chosen(found, arm):
            cells = [compare_books(run, found, baseline) for baseline in BASELINES if baseline != arm]
            if arm not in BASELINES and any(cells):
                rows.append([arm, run["rate"], str(run["seed"]), *cells])
    return as_table(["arm", "rate", "seed", *(f"minus {baseline}" for baseline in BASELINES)], rows)


def compare_books(run: Found, found: list[Found], baseline: str) -> str:
    """The difference of losses over all books, its interval by bootstrap over books, and in how many it is negative."""
    others = [other for other in chosen(found, baseline) if other["seed"] == run["seed"]]
    if not others:
        return ""
    books, other_books = run["test"]["books"], others[0]["test"]["books"]
    sums = [books[name][0] - other_books[name][0] for name in books]
    sizes = [books[name][1] for name in books]
    low, high = bootstrap_ratio(sums, sizes)
    lower = sum(each < 0 for each in sums)
    return f"{sum(sums) / sum(sizes):+.3f} ({low:+.3f} to {high:+.3f}), lower in {lower} of {len(books)}"


def tabulate_sizes(found: list[Found]) -> str:
    """A row per memory size, all with the first seed."""
    head = ["arm", "size", "memory (numbers)", "carried (bytes)", "loss of the test books, seed 0"]
    rows = [
        [
            *(arm, run["size"] or "as above", f"{run['memory_numbers']:,}", f"{run['carried_bytes']:,}"),
            f"{run['test']['loss']:.4f}",
        ]
        for arm in arms_of(found)
        for run in by_size(found, arm)
    ]
    return as_table(head, rows)


def by_size(found: list[Found], arm: str) -> list[Found]:
    """The runs of the first seed, from the smallest memory to the largest."""
    own = [run for run in chosen(found, arm) if run["seed"] == 0]
    return sorted([run for run in found if run["arm"] == arm and run["size"]] + own, key=lambda r: r["memory_numbers"])


def tabulate_rates(found: list[Found]) -> str:
    """The grid of learning rates, the same for all arms; the validation books choose."""
    rates = sorted({run["rate"] for run in found}, key=float)
    rows = []
    for arm in arms_of(found):
        tried = {run["rate"]: run for run in found if run["arm"] == arm and not run["size"] and run["seed"] == 0}
        rows.append([arm, *(f"{tried[rate]['validation']['loss']:.4f}" if rate in tried else "" for rate in rates)])
    return as_table(["loss of the validation books, seed 0", *rates], rows)


def draw(found: list[Found], path: Path) -> None:
    """Perplexity against the bytes of the memory in fp32; arms without one are lines across."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.6), layout="constrained")
    for arm in arms_of(found):
        colour, runs = COLOURS[arm], by_size(found, arm)
        if runs[0]["memory_numbers"] == 0:
            style = {"local": "--", "full": ":"}[arm]
            axes.axhline(runs[0]["test"]["perplexity"], color=colour, linestyle=style, label=f"{arm} (carries nothing)")
            continue
        sizes = [4 * run["memory_numbers"] for run in runs]
        axes.plot(sizes, [run["test"]["perplexity"] for run in runs], "o-", color=colour, label=arm)
        others = [run for run in chosen(found, arm) if run["seed"] != 0]
        axes.plot(
            [4 * run["memory_numbers"] for run in others],
            [run["test"]["perplexity"] for run in others],
            "x",
            color=colour,
        )
    axes.set(
        xscale="log",
        xlabel="memory of a sequence (bytes, fp32)",
        ylabel="perplexity of the test books",
        title="Line: seed 0, by size of the memory; crosses: other seeds",
    )
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


PAGE = ResultPage(
    "table2",
    "benchmarks/table2.py",
    {
        "the arms, trained longer": lambda: tabulate_arms(load()),
        "book by book": lambda: tabulate_differences(load()),
        "learning rates, trained longer": lambda: tabulate_rates(load()),
        "the arms": lambda: tabulate_arms(load("table2_short")),
        "sizes of the memory": lambda: tabulate_sizes(load("table2_short")),
        "learning rates": lambda: tabulate_rates(load("table2_short")),
    },
)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_report()
