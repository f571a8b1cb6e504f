"""Pages of docs/results/: the tables between a program's marks are made from the files in benchmarks/results/.

A block of a page begins with ``<!-- NAME: written by PROGRAM -->`` and ends with ``<!-- end of NAME -->``; everything
outside the blocks is written by hand.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
PATHS = ("checkpoint", "folder", "data")  # fields that hold paths of the machine that ran the test


@dataclass(frozen=True)
class ResultPage:
    """A page of docs/results/ and the blocks that one program writes into it."""

    name: str
    program: str
    blocks: dict[str, Callable[[], str]]

    @property
    def path(self) -> Path:
        return ROOT / "docs" / "results" / f"{self.name}.md"

    def render(self) -> str:
        """The page as it is, with this program's blocks made from the kept results."""
        text = self.path.read_text(encoding="utf-8")
        for block, make in self.blocks.items():
            begin, end = f"<!-- {block}: written by {self.program} -->", f"<!-- end of {block} -->"
            text = fill_between(text, begin, end, make())
        return text

    def write(self) -> None:
        """Brings the file up to date, and says which it was."""
        self.path.write_text(self.render(), encoding="utf-8")
        print(f"written: {self.path.relative_to(ROOT)}")

    def main(self, description: str | None) -> None:
        """The whole of a program that only writes the page."""
        argparse.ArgumentParser(description=description).parse_args()
        self.write()


def fill_between(text: str, begin: str, end: str, block: str) -> str:
    """The text with what stands between its two marks replaced by `block`."""
    assert text.count(begin) == text.count(end) == 1, f"the page needs {begin} and {end} once each"
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"


def as_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def load_results(folder: str) -> dict[str, dict[str, Any]]:
    """Every result kept in benchmarks/results/FOLDER by file name without suffix, sorted."""
    files = sorted((RESULTS / folder).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def keep_result(name: str, result: dict[str, Any]) -> None:
    """Writes benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def keep_tests(
    description: str | None,
    tests: str,
    name_of: Callable[[dict[str, Any]], str],
    draw: Callable[[], Any],
    page: ResultPage,
) -> None:
    """The whole of a program that keeps tests of models, and makes a picture and a page from all kept ones.

    Args:
        description: of the program.
        tests: what they are, for its help.
        name_of: of a test's results: the part of its file's name after the model's.
        draw: makes the picture, a figure of matplotlib.
        page: named as the picture and the folder of the kept tests.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help=f"of {tests}, with results.json")
    parser.add_argument("--name", default="model", help="of the model")
    options = parser.parse_args()
    for folder in options.folders:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        kept = {"model": options.name, **without_paths(found)}
        keep_result(f"{page.name}/{options.name}-{name_of(found)}", kept)
    draw().savefig(IMAGES / f"{page.name}.png", dpi=150)
    page.write()


def without_paths(result: dict[str, Any]) -> dict[str, Any]:
    """A test's results without the fields that name places on the machine that ran it."""
    return {name: value for name, value in result.items() if name not in PATHS}
