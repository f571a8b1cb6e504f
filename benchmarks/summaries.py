"""Keeps what tests of summaries found, and writes the table of docs/results.md from it.

    python benchmarks/summaries.py runs/key_books/8K runs/key_books/64K

Each folder of `infini-train eval summarise --out` becomes a file in benchmarks/results/summaries/. Without folders only
the table is written, from the files that are there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "benchmarks" / "results" / "summaries"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- summaries table: written by benchmarks/summaries.py -->", "<!-- end of the summaries table -->"
DROPPED = ("checkpoint", "folder")  # paths of one machine
MEASURES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "overall": "overall"}
WRITERS = {"model": "model", "lead_3": "lead-3", "random": "random"}


def main() -> None:
    """Collects folders, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="of tests of summaries")
    for folder in parser.parse_args().folders:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        kept = {name: value for name, value in found.items() if name not in DROPPED}
        FILES.mkdir(parents=True, exist_ok=True)
        path = FILES / f"{folder.resolve().parent.name}-{folder.name}.json"
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), load()), encoding="utf-8")


def load() -> dict[str, dict[str, Any]]:
    """All that was kept, by its name, shorter books first."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: (item[1]["book_tokens"]["mean"], item[0])))


def fill_page(page: str, found: dict[str, dict[str, Any]]) -> str:
    """The page with the table between its two marks written anew."""
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{format_table(found)}\n\n{END}{tail}"


def format_table(found: dict[str, dict[str, Any]]) -> str:
    """A row for each test and for each of model, lead-3 and random."""
    head = ["test", "books", "tokens", "summary by", *MEASURES.values(), "tokens/s", "peak MB"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, test in found.items():
        tokens = f"{test['book_tokens']['min']:,} to {test['book_tokens']['max']:,}"
        for key, label in WRITERS.items():
            row = test[key]
            scores = (f"{row[m]:.1f} ({row[f'{m}_95'][0]:.1f}-{row[f'{m}_95'][1]:.1f})" for m in MEASURES)
            measured = (f"{test['read_tokens_per_s']:,.0f}", f"{test['peak_memory_mb']:,.0f}")
            speed = measured if key == "model" else ("", "")
            rows.append(f"| {' | '.join([name, str(row['books']), tokens, label, *scores, *speed])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
