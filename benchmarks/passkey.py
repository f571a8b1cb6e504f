"""Keeps the passkey tests of trained runs, and writes the tables of docs/results/passkey.md from all kept tests.

    infini-train train passkey
    infini-train eval passkey runs/passkey --lengths 8K 32K 128K --samples 40 --seed 1
    python benchmarks/passkey.py runs/passkey

Every test in eval/ of the runs becomes a file in benchmarks/results/passkey/, named after the run, its seed and the
test's seed. Without runs, only the tables are written. Tests of one recipe with the same result share a row.
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

from page import ROOT, ResultPage, as_table, keep_result, load_results, without_paths

from infini_train.command_line import format_length
from infini_train.config.files import read_tree, validate
from infini_train.data.synthetic.wordings import WORDINGS
from infini_train.statistics import format_percent, wilson_interval

POOLED_TOKENS = 128 * 1024  # the pooled column holds lengths up to this one
USUAL_WITHOUT = (8000, 32, 8192)  # steps, overlap and pressure of passkey_no_conv and passkey_no_conv_delta


def main() -> None:
    """Keeps the tests of the given runs, then writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of trained and tested runs")
    for run in parser.parse_args().runs:
        collect(run)
    PAGE.write()


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
    known = load_results("passkey")
    for path in sorted(run.glob("eval/passkey-*/results.json")):  # of tests that have ended
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {"run": about, "test": without_paths(found)}
        words = [re.sub("[^a-z0-9]+", "_", part) for part in config.name.lower().split(", ")]
        name = f"{'--'.join(words)}-{config.seed}-{found['wording']}-{found['seed']}"
        if known.get(name, {}).get("test") != kept["test"]:  # else the commit would be today's
            keep_result(f"passkey/{name}", kept)


def load() -> list[dict[str, Any]]:
    """All kept tests, in the order of their files' names."""
    return list(load_results("passkey").values())


def tabulate_runs(found: list[dict[str, Any]]) -> str:
    """A row for each recipe and update; step times and commits in the order of the seeds."""
    about = {(kept["run"]["name"], kept["run"]["seed"]): kept["run"] for kept in found}
    recipes: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for (name, _), run in sorted(about.items()):
        words = "redrawn" if run.get("varied_wording") else "fixed"
        fixed = (str(run["overlap_tokens"]), str(run.get("conv_tokens", 0)), f"{run['pressure']:g}", words)
        recipe = (name, run["update"], *fixed, f"{run['window_tokens']:,}", f"{run['steps']:,}")
        recipes.setdefault(recipe, []).append(run)
    rows = []
    for (name, update, *rest), runs in recipes.items():
        seeds = ", ".join(str(run["seed"]) for run in runs)
        times = ", ".join(f"{1000 * run['median_step_s']:.0f}" for run in runs)
        rows.append([name, update, seeds, *rest, times, ", ".join(dict.fromkeys(run["commit"] for run in runs))])
    settings = ["overlap", "convolution", "pressure", "wording", "sequence length", "steps"]
    return as_table(["run", "update", "seeds", *settings, "median step (ms)", "kept at commit"], rows)


def tabulate_tests(found: list[dict[str, Any]], convolution: bool) -> str:
    """Exact answers by length, over all positions of the key; equal tests of one recipe share a row."""
    found = [kept for kept in found if bool(kept["run"].get("conv_tokens")) == convolution]
    lengths = sorted({length["length_tokens"] for kept in found for length in kept["test"]["lengths"]})
    pooled: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for kept in found:
        run = kept["run"]
        recipe = (run["steps"], run["overlap_tokens"], run["pressure"])
        pooled.setdefault((recipe, *_test_cells(kept, lengths)), []).append(kept)
    usual = next(iter(pooled))[0] if convolution else USUAL_WITHOUT
    order = sorted(pooled.items(), key=lambda row: (row[0][0] != usual, row[0][1] != "paper"))
    rows = [[str(len(tests)), _name_runs(tests), *cells, _pool(tests)] for (_, *cells), tests in order]
    names = [format_length(length) for length in lengths]
    head = ["tests", "runs and seeds", "wording", "key phases", *names, f"up to {format_length(POOLED_TOKENS)}"]
    return as_table([*head, "worst cell", "all tests of the row"], rows)


def _name_runs(tests: list[dict[str, Any]]) -> str:
    seeds: dict[str, list[str]] = {}
    for test in tests:
        seeds.setdefault(test["run"]["name"], []).append(str(test["run"]["seed"]))
    return "; ".join(f"{name}: {', '.join(numbers)}" for name, numbers in sorted(seeds.items()))


def _pool(tests: list[dict[str, Any]]) -> str:
    cells = [length for kept in tests for length in kept["test"]["lengths"]]
    return _share(sum(cell["exact"] for cell in cells), sum(cell["samples"] for cell in cells))


def _test_cells(kept: dict[str, Any], lengths: list[int]) -> list[str]:
    run, test = kept["run"], kept["test"]
    scores = {length["length_tokens"]: (length["exact"], length["samples"]) for length in test["lengths"]}
    short = [score for length, score in scores.items() if length <= POOLED_TOKENS]
    worst = min(test["cells"], key=lambda cell: cell["exact_match"])
    assert test["wording"] in WORDINGS
    seen = test["wording"] == "paper" and not run["varied_filler"]
    return [
        f"{test['wording']} (seen)" if seen else test["wording"],
        f"{test['key_phases']} of {test['segment_tokens']}",
        *(_share(*scores[length]) if length in scores else "" for length in lengths),
        _share(sum(exact for exact, _ in short), sum(samples for _, samples in short)) if short else "",
        f"{worst['exact']}/{worst['samples']} at {format_length(worst['length_tokens'])}, {worst['position']:g}",
    ]


def _share(exact: int, samples: int) -> str:
    low, high = wilson_interval(exact, samples)
    return f"{exact:,}/{samples:,} ({format_percent(low)}-{format_percent(high)})"


PAGE = ResultPage(
    "passkey",
    "benchmarks/passkey.py",
    {
        "passkey runs": lambda: tabulate_runs(load()),
        "passkey tests": lambda: tabulate_tests(load(), convolution=True),
        "passkey tests without convolution": lambda: tabulate_tests(load(), convolution=False),
    },
)


if __name__ == "__main__":
    main()
