"""Keeps scores of story summaries, and makes the table and the picture of docs/results/summaries.md.

    infini-train eval summarise runs/stories/infini --data runs/stories/test-400.jsonl --temperature 0 --out found
    python benchmarks/summaries.py found --model infini-delta --data runs/stories/test-400.jsonl

Kept are the ROUGE scores of the test and how many of a story's eight facts each summary states, read off its fixed
form. The result becomes a file in benchmarks/results/summaries/. Without a folder, only table and picture are made.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402 (the backend must be chosen first)
from page import IMAGES, ResultPage, as_table, keep_result, load_results  # noqa: E402
from stories import FACTS, SUMMARY  # noqa: E402

from infini_train.statistics import bootstrap_ratio, format_share  # noqa: E402

FORM = re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(SUMMARY)))
KEPT = (
    "data_sha256",
    "step",
    "temperature",
    "samples",
    "book_tokens",
    "read_tokens_per_s",
    "peak_memory_mb",
    "model",
    "random",
)
CHANCE = 100 / 16


def main() -> None:
    """Keeps a result, then writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of a test, with summaries.jsonl and results.json")
    parser.add_argument("--model", help="name of the model in the table")
    parser.add_argument("--data", type=Path, metavar="FILE", help="the stories, as benchmarks/stories.py wrote them")
    options = parser.parse_args()
    if options.folder is not None:
        if options.model is None or options.data is None:
            parser.error("give --model and --data with a folder")
        kept = {"name": options.model, "stories": options.data.stem, **collect(options.folder, options.data, parser)}
        keep_result(f"summaries/{options.model}-{options.data.stem}", kept)
    draw(load()).savefig(IMAGES / "summaries.png", dpi=150)
    PAGE.write()


def collect(folder: Path, stories: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The test's results, and right facts: by kind, and of each summary."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if not results["complete"]:
        parser.error(f"{folder}: the test has not read all stories yet; run it to the end")
    if results["data_sha256"] != hashlib.sha256(stories.read_bytes()).hexdigest():
        parser.error(f"--data: {folder} is no test of {stories}")
    wanted = [read_facts(json.loads(line)["summary"]) for line in stories.read_text(encoding="utf-8").splitlines()]
    lines = (folder / "summaries.jsonl").read_text(encoding="utf-8").splitlines()[1:]  # after the settings
    right = []
    for line in map(json.loads, lines):
        said, truth = read_facts(line["said"]), wanted[line["number"]]
        right.append([said.get(kind) == truth[kind] for kind in FACTS])
    by_kind = {kind: sum(column) for kind, column in zip(FACTS, zip(*right, strict=True), strict=True)}
    kept = {name: results[name] for name in KEPT}
    return {**kept, "summaries": len(right), "right_by_kind": by_kind, "right_of_each": [sum(row) for row in right]}


def read_facts(summary: str) -> dict[str, str]:
    """The facts that a summary states; none if it lacks the form."""
    match = FORM.fullmatch(summary.strip())
    return match.groupdict() if match else {}


def load() -> list[dict[str, Any]]:
    """All kept results, shorter stories first."""
    return sorted(load_results("summaries").values(), key=lambda test: (test["name"], test["book_tokens"]["mean"]))


def facts_of(test: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    """Share of right facts, and its interval by bootstrap over the summaries."""
    right = test["right_of_each"]
    return sum(right) / (len(FACTS) * len(right)), bootstrap_ratio(right, [len(FACTS)] * len(right))


def tabulate(found: list[dict[str, Any]]) -> str:
    """A row per model and length, then which facts; the longest stories last."""
    head = ["model", "story (tokens)", "stories", "facts, % (95 %)", "ROUGE-1", "-2", "-L", "of another story", *FACTS]
    rows = []
    for test in found:
        share, interval = facts_of(test)
        scores = [f"{test['model'][name]:.1f}" for name in ("rouge1", "rouge2", "rougeL")]
        other = "/".join(f"{test['random'][name]:.0f}" for name in ("rouge1", "rouge2", "rougeL"))
        kinds = [f"{100 * right / test['summaries']:.0f}" for right in test["right_by_kind"].values()]
        stories, tokens = str(test["model"]["books"]), f"{test['book_tokens']['mean']:,.0f}"
        rows.append([test["name"], tokens, stories, format_share(share, interval), *scores, other, *kinds])
    return as_table(head, rows)


def draw(found: list[dict[str, Any]]) -> Figure:
    """Right facts against the story's length, a line per model."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(test["name"] for test in found):
        tests = [test for test in found if test["name"] == name]
        tokens = [test["book_tokens"]["mean"] for test in tests]
        shares, bounds = zip(*(facts_of(test) for test in tests), strict=True)
        low, high = zip(*bounds, strict=True)
        (line,) = axes.plot(tokens, [100 * share for share in shares], marker="o", label=name)
        axes.fill_between(tokens, [100 * x for x in low], [100 * x for x in high], alpha=0.2, color=line.get_color())
    axes.axhline(CHANCE, linestyle=":", color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens of a story", ylabel="facts in the summary (%); dotted: chance", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


PAGE = ResultPage("summaries", "benchmarks/summaries.py", {"summaries": lambda: tabulate(load())})


if __name__ == "__main__":
    main()
