"""Keeps BABILong tests, and makes the table and the picture of docs/results/babilong.md from all kept tests.

    infini-train eval babilong runs/babilong --haystack books.jsonl --out found/babilong
    python benchmarks/babilong.py --name babilong found/babilong

Each folder's results become a file in benchmarks/results/babilong/. Without folders, only table and picture are made.
"""

from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402 (the backend must be chosen first)
from page import ResultPage, as_table, keep_tests, load_results  # noqa: E402

from infini_train.command_line import format_length  # noqa: E402
from infini_train.statistics import format_share, wilson_interval  # noqa: E402

GUESS_SHARE = 1 / 6  # of the prompts, right by always giving the same place
Row = tuple[str, str, str]  # model, task, haystack


def name_test(found: dict[str, Any]) -> str:
    """Names a test by what else it may be kept beside."""
    lengths = [format_length(row["length_tokens"]) for row in found["lengths"]]
    return "-".join([found["haystack"], str(found["seed"]), *lengths])


def collect() -> dict[Row, dict[int, tuple[int, int]]]:
    """Right answers and prompts by length, of each model, task and haystack; tests of the same are added up."""
    found: dict[Row, dict[int, tuple[int, int]]] = {}
    for test in load_results("babilong").values():
        for cell in test["cells"]:
            scores = found.setdefault((test["model"], cell["task"], test["haystack"]), {})
            right, asked = scores.get(cell["length_tokens"], (0, 0))
            scores[cell["length_tokens"]] = right + cell["exact"], asked + cell["samples"]
    return found


def draw() -> Figure:
    """Right answers against the length of the text, a line per model and task, with Wilson's 95 % intervals."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes, lengths = figure.subplots(), set()
    for (model, task, haystack), scores in collect().items():
        at = sorted(scores)
        lengths |= set(at)
        shares = [100 * scores[length][0] / scores[length][1] for length in at]
        (line,) = axes.plot(at, shares, "o-", label=f"{model}, {task.upper()}, {haystack}")
        low, high = zip(*(wilson_interval(*scores[length]) for length in at), strict=True)
        axes.fill_between(at, [100 * x for x in low], [100 * x for x in high], alpha=0.15, color=line.get_color())
    axes.axhline(100 * GUESS_SHARE, ls=":", color="grey", label="always the same answer")
    axes.set(xscale="log", xlabel="tokens in the text", ylabel="right answers (%)", ylim=(0, 101))
    axes.set_xticks(sorted(lengths), [format_length(length) for length in sorted(lengths)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def tabulate() -> str:
    """A row for each model, task and haystack, a column for each length."""
    found = collect()
    lengths = sorted({length for scores in found.values() for length in scores})
    rows = [
        [*row, *(_format(*scores[length]) if length in scores else "" for length in lengths)]
        for row, scores in found.items()
    ]
    return as_table(["model", "task", "haystack", *map(format_length, lengths)], rows)


def _format(right: int, asked: int) -> str:
    return f"{right}/{asked}: {format_share(right / asked, wilson_interval(right, asked))}"


PAGE = ResultPage("babilong", "benchmarks/babilong.py", {"BABILong tests": tabulate})


if __name__ == "__main__":
    keep_tests(__doc__, "BABILong tests", name_test, draw, PAGE)
