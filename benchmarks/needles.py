"""Keeps needle tests, and writes the table of docs/results/needles.md from all kept tests.

    infini-train eval needles models/passkey-delta --task multikey --out tests/multikey
    python benchmarks/needles.py --name passkey-delta tests/multikey

Each folder's results become a file in benchmarks/results/needles/. Without folders, only the table is written.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from page import ResultPage, as_table, keep_result, load_results, without_paths

from infini_train.eval.intervals import format_share, wilson_interval
from infini_train.eval.passkey_scores import format_length


def main() -> None:
    """Keeps results, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="of needle tests, with results.json")
    parser.add_argument("--name", default="model", help="of the model")
    options = parser.parse_args()
    for folder in options.folders:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        name = f"{options.name}-{found['task']}-{found['haystack']}-{found['seed']}"
        keep_result(f"needles/{name}", {"model": options.name, **without_paths(found)})
    PAGE.write()


def tabulate() -> str:
    """A row for each model, task, haystack and length, a column for each number of needles; depths are pooled."""
    tests = load_results("needles").values()
    counts = sorted({cell["needles"] for test in tests for cell in test["cells"]})
    cells: dict[tuple[str, str, str, int], dict[int, list[dict[str, Any]]]] = {}
    for test in tests:
        for cell in test["cells"]:
            row = (test["model"], test["task"], test["haystack"], cell["length_tokens"])
            cells.setdefault(row, {}).setdefault(cell["needles"], []).append(cell)
    rows = [
        [*row[:3], format_length(row[3]), *(_format(found[count]) if count in found else "" for count in counts)]
        for row, found in cells.items()
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
    main()
