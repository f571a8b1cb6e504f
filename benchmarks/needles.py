"""Keeps what needle tests found, and writes the tables of docs/results.md on harder memory from the kept files.

    infini-train eval needles models/passkey-delta --task multikey --out tests/multikey
    python benchmarks/needles.py --name passkey-delta tests/multikey

Each folder's results become a file in benchmarks/results/needles/. Without folders only the tables are written, from
the files that are there: needles, capacity (benchmarks/capacity.py) and streaming (benchmarks/streaming.py).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from page import as_table, fill_between

from infini_train.command_line import format_length
from infini_train.statistics import format_share, wilson_interval

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
DROPPED = ("checkpoint", "folder")  # paths of one machine


def main() -> None:
    """Keeps results, then writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="of needle tests, with results.json")
    parser.add_argument("--name", default="model", help="of the model")
    options = parser.parse_args()
    for folder in options.folders:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        kept = {"model": options.name, **{name: value for name, value in found.items() if name not in DROPPED}}
        (RESULTS / "needles").mkdir(parents=True, exist_ok=True)
        file = RESULTS / "needles" / f"{options.name}-{found['task']}-{found['haystack']}-{found['seed']}.json"
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def fill_page(page: str) -> str:
    """The page with the tables written anew that stand between marks, as far as there are results."""
    for name, table in (("needles", needles), ("capacity", capacity), ("streaming", streaming)):
        begin, end = f"<!-- {name} table -->", f"<!-- end of the {name} table -->"
        if begin in page:
            page = fill_between(page, begin, end, table())
    return page


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def needles() -> str:
    """A row for each test, length and number of needles; depths pooled."""
    rows = []
    for path in sorted((RESULTS / "needles").glob("*.json")):
        test = load(f"needles/{path.name}")
        for length, count in sorted({(cell["length_tokens"], cell["needles"]) for cell in test["cells"]}):
            cells = [cell for cell in test["cells"] if (cell["length_tokens"], cell["needles"]) == (length, count)]
            exact, asked = (sum(cell[name] for cell in cells) for name in ("exact", "samples"))
            right, words = (sum(cell[name] for cell in cells) for name in ("right_words", "words"))
            rows.append(
                [
                    test["model"],
                    test["task"],
                    test["haystack"],
                    format_length(length),
                    str(count),
                    f"{exact}/{asked}",
                    format_share(exact / asked, wilson_interval(exact, asked)),
                    format_share(right / words, wilson_interval(right, words)),
                ]
            )
    head = ["model", "task", "hay", "tokens", "needles", "all words right", "% (95 %)", "words, % (95 %)"]
    return as_table(head, rows)


def capacity() -> str:
    """Most pairs recalled to 90 %, by form and what is varied."""
    rows, found = [], load("capacity.json")["rows"]
    for key_dim, heads, scale in dict.fromkeys((row["key_dim"], row["heads"], row["scale"]) for row in found):
        same = [row for row in found if (row["key_dim"], row["heads"], row["scale"]) == (key_dim, heads, scale)]
        by_update = {row["update"]: str(row["capacity"]) for row in same}
        rows.append([str(key_dim), str(heads), f"{scale:g}", *by_update.values()])
    forms = list(dict.fromkeys(row["update"] for row in found))
    return as_table(["key size", "heads", "scale", *forms[:-1], f"{forms[-1]}, no normaliser"], rows)


def streaming() -> str:
    """Speed and memory at both places."""
    found = load("streaming.json")
    rows = [
        [
            f"{run['early_tokens_per_s']:,.0f}",
            f"{run['late_tokens_per_s']:,.0f}",
            f"{run['late_tokens_per_s'] / run['early_tokens_per_s']:.3f}",
            f"{run['early_resident_mb']:.1f}",
            f"{run['late_resident_mb']:.1f}",
            f"{run['late_resident_mb'] / run['early_resident_mb']:.3f}",
        ]
        for run in found["runs"]
    ]
    end = format_length(found["tokens"])
    head = ["tokens/s at 32K", f"near {end}", "ratio", "resident MB at 32K", f"near {end}", "ratio"]
    return as_table(head, rows)


if __name__ == "__main__":
    main()
