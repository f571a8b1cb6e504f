"""Keeps needle tests, and makes the table and the picture of docs/results/needles.md from all kept tests.

    infini-train eval needles models/passkey-delta --task multikey --out tests/multikey
    python benchmarks/needles.py --name passkey-delta tests/multikey

Each folder's results become a file in benchmarks/results/needles/. Without folders, only table and picture are made.
"""

from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402 (the backend must be chosen first)
from page import ResultPage, as_table, keep_tests, load_results  # noqa: E402

from infini_train.command_line import format_length  # noqa: E402
from infini_train.statistics import format_share, wilson_interval  # noqa: E402

GUESS = "guessing among the keys of the text"


def name_test(found: dict[str, Any]) -> str:
    """Names a test by what else it may be kept beside."""
    worded = [found["wording"]] if "wording" in found else []
    return "-".join([found["task"], found["haystack"], *worded, str(found["seed"])])


def draw() -> Figure:
    """Exact answers to multikey prompts against the number of keys, a line per model; lengths and tests are pooled."""
    scores: dict[str, dict[int, list[int]]] = {}
    for test in load_results("needles").values():
        for cell in test["cells"] if test["task"] == "multikey" and "wording" not in test else []:
            score = scores.setdefault(test["model"], {}).setdefault(cell["needles"], [0, 0])
            score[0] += cell["exact"]
            score[1] += cell["samples"]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for model, found in scores.items():
        counts = sorted(found)
        (line,) = axes.plot(counts, [100 * found[count][0] / found[count][1] for count in counts], "o-", label=model)
        low, high = zip(*(wilson_interval(*found[count]) for count in counts), strict=True)
        axes.fill_between(counts, [100 * x for x in low], [100 * x for x in high], alpha=0.15, color=line.get_color())
    counts = sorted({count for found in scores.values() for count in found})
    axes.plot(counts, [100 / count for count in counts], ":", color="grey", label=GUESS)
    axes.set(xscale="log", xlabel="keys in the text", ylabel="prompts answered exactly (%)", ylim=(0, 101))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return figure


def tabulate() -> str:
    """A row for each model, task, haystack and length, a column for each number of needles; depths are pooled."""
    tests = load_results("needles").values()
    counts = sorted({cell["needles"] for test in tests for cell in test["cells"]})
    cells: dict[tuple[str, str, str, int], dict[int, list[dict[str, Any]]]] = {}
    for test in tests:
        for cell in test["cells"]:
            hay = test["haystack"] + (f", wording {test['wording']}" if "wording" in test else "")
            row = (test["model"], test["task"], hay, cell["length_tokens"])
            cells.setdefault(row, {}).setdefault(cell["needles"], []).append(cell)
    groups = list(dict.fromkeys(row[:3] for row in cells))  # in the order of the files, whatever lengths each has
    rows = [
        [*row[:3], format_length(row[3]), *(_format(found[count]) if count in found else "" for count in counts)]
        for row, found in sorted(cells.items(), key=lambda item: (groups.index(item[0][:3]), item[0][3]))
    ]
    needles = [f"{count} needle{'s' if count > 1 else ''}" for count in counts]
    return as_table(["model", "task", "haystack", "length", *needles], rows)


def _format(cells: list[dict[str, Any]]) -> str:
    """Prompts answered exactly; the share of right words too where it differs."""
    exact, asked, right, words = (sum(c[name] for c in cells) for name in ("exact", "samples", "right_words", "words"))
    whole = format_share(exact / asked, wilson_interval(exact, asked))
    each = format_share(right / words, wilson_interval(right, words))
    return f"{exact}/{asked}: {whole}" + (f"; words {each}" if each != whole else "")


PAGE = ResultPage("needles", "benchmarks/needles.py", {"needle tests": tabulate})


if __name__ == "__main__":
    keep_tests(__doc__, "needle tests", name_test, draw, PAGE)
