"""Keeps what passkey tests of trained runs found, and writes the tables of docs/results.md from it.

    infini-train train passkey
    infini-train eval passkey runs/passkey --lengths 8K 32K 128K --samples 40 --seed 1
    python benchmarks/passkey.py runs/passkey

Every test in eval/ of the runs becomes a file in benchmarks/results/passkey/, under the run's name, its seed and the
test's. Without runs only the tables are written, from the files that are there.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

from page import fill_between

from infini_train.command_line import format_length
from infini_train.config.files import read_tree, validate
from infini_train.data.synthetic.wordings import WORDINGS
from infini_train.statistics import format_percent, wilson_interval

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "benchmarks" / "results" / "passkey"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- passkey tables: written by benchmarks/passkey.py -->", "<!-- end of the passkey tables -->"
POOLED_TOKENS = 128 * 1024  # the pooled column holds lengths up to this one
DROPPED = ("checkpoint", "folder")  # paths of one machine


def main() -> None:
    """Collects runs, then writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of trained and tested runs")
    for run in parser.parse_args().runs:
        collect(run)
    PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), load()), encoding="utf-8")


def collect(run: Path) -> None:
    """Copies every test of a run, with what the run was."""
    config = validate(read_tree(run / "config.yaml"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    step_s = statistics.median(row["speed/step_s"] for row in rows if "speed/step_s" in row)
    passkey, attention = config.data.synthetic, config.model.attention
    about = {
        "name": config.name,
        "update": getattr(attention, "update", None),
        "overlap_tokens": getattr(attention, "overlap_tokens", 0),
        "conv_tokens": getattr(attention, "conv_tokens", 0),
        "pressure": None if passkey is None else passkey.pressure,
        "varied_filler": None if passkey is None else passkey.varied_filler,
        "varied_wording": None if passkey is None else passkey.varied_wording,
        "seed": config.seed,
        "window_tokens": config.train.window_tokens,
        "steps": config.train.total_steps,
        "median_step_s": step_s,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
    }
    for path in sorted(run.glob("eval/passkey-*/results.json")):  # of tests that have ended
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {"run": about, "test": {name: value for name, value in found.items() if name not in DROPPED}}
        words = [re.sub("[^a-z0-9]+", "_", part) for part in config.name.lower().split(", ")]
        name = f"{'--'.join(words)}-{config.seed}-{found['wording']}-{found['seed']}"
        FILES.mkdir(parents=True, exist_ok=True)
        file = FILES / f"{name}.json"
        known = json.loads(file.read_text(encoding="utf-8"))["test"] if file.exists() else None
        if known != kept["test"]:  # else the commit would be today's
            file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def load() -> list[dict[str, Any]]:
    """All that was kept, in the order of the files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FILES.glob("*.json"))]


def fill_page(page: str, found: list[dict[str, Any]]) -> str:
    """The page with the tables between its two marks written anew."""
    return fill_between(page, BEGIN, END, format_tables(found))


def format_tables(found: list[dict[str, Any]]) -> str:
    """Runs, then tests: right answers by length, over all positions of the key."""
    about = {(kept["run"]["name"], kept["run"]["seed"]): kept["run"] for kept in found}
    runs = [
        "| run | seed | update | overlap | convolution | pressure | words | texts up to | steps | median step |"
        " kept at |",
        "|---" * 11 + "|",
    ]
    runs += [
        f"| {name} | {seed} | {run['update']} | {run['overlap_tokens']} | {run.get('conv_tokens', 0)} |"
        f" {run['pressure']:g} | {'drawn too' if run.get('varied_wording') else 'one wording'} |"
        f" {run['window_tokens']:,} | {run['steps']:,} | {1000 * run['median_step_s']:.0f} ms | {run['commit']} |"
        for (name, seed), run in sorted(about.items())
    ]
    lengths = sorted({length["length_tokens"] for kept in found for length in kept["test"]["lengths"]})
    names = [format_length(length) for length in lengths]
    head = [
        "run",
        "seed",
        "wording, its filler",
        "key's phases",
        *names,
        f"up to {format_length(POOLED_TOKENS)}",
        "worst cell",
    ]
    tests = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(_test_row(kept, lengths) for kept in found)]
    return "\n".join([*runs, "", *tests])


def _test_row(kept: dict[str, Any], lengths: list[int]) -> str:
    run, test = kept["run"], kept["test"]
    scores = {length["length_tokens"]: (length["exact"], length["samples"]) for length in test["lengths"]}
    pooled = [score for length, score in scores.items() if length <= POOLED_TOKENS]
    worst = min(test["cells"], key=lambda cell: cell["exact_match"])
    seen = "seen" if test["wording"] == "paper" and not run["varied_filler"] else "unseen"
    assert test["wording"] in WORDINGS
    cells = [
        run["name"],
        str(run["seed"]),
        f"{test['wording']} ({seen})",
        f"{test['key_phases']} of {test['segment_tokens']}",
        *(_share(*scores[length]) if length in scores else "" for length in lengths),
        _share(sum(exact for exact, _ in pooled), sum(samples for _, samples in pooled)) if pooled else "",
        f"{worst['exact']}/{worst['samples']} at {format_length(worst['length_tokens'])}, {worst['position']:g}",
    ]
    return f"| {' | '.join(cells)} |"


def _share(exact: int, samples: int) -> str:
    low, high = wilson_interval(exact, samples)
    return f"{exact}/{samples} ({format_percent(low)}-{format_percent(high)})"


if __name__ == "__main__":
    main()
