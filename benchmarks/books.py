"""Attention variants side by side on long books: equal parameters, tokens and tuning, several seeds.

    python benchmarks/books.py --train books/train.jsonl.gz --validation books/validation.jsonl.gz

Any long documents will do. Encodes them, trains configs/run/books.yaml once for each arm and seed, evaluates the
held-out documents from their beginnings, and writes results.json, table.md and loss.png. Interrupted, it goes on where
it was. A short run reads few books, so that their order matters more than the initial weights: --order-seed keeps it
the same for all seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 (the backend must be chosen first)

from data_tools.readers import documents  # noqa: E402

ARMS = {  # name -> what differs from configs/run/books.yaml
    "infini": ["model.attention.kind=infini"],
    "local": ["model.attention.kind=local"],
    "delta": ["model.attention.update=delta"],
}
COLOURS = {"infini": "tab:red", "local": "tab:blue", "delta": "tab:orange"}


def main() -> None:
    """Runs what is missing, then reports."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(options)
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    with ThreadPoolExecutor(options.parallel) as pool:
        rows = list(pool.map(lambda job: run(options, *job), jobs))
    (options.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    table = tabulate(rows)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    draw(rows, options.out / "loss.png")
    print(table)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="long documents to train on (first time only)")
    parser.add_argument("--validation", help="long documents held out (first time only)")
    parser.add_argument(
        "--beginning",
        type=int,
        help="only so many characters of each training document (first time only; default: all)",
    )
    parser.add_argument("--order-seed", type=int, default=0, help="order of the documents, the same for all seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/books"))
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=["infini", "local"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--parallel", type=int, default=os.cpu_count() or 1, help="runs side by side (default: the cores)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="for all arms alike")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    """A tokenizer of 2048 pieces and the shards, unless they are there."""
    data, model = options.out / "data", options.out / "tokenizer.model"
    if (data / "validation" / "manifest.json").exists():
        return
    if not (options.train and options.validation):
        sys.exit(f"error: {data} holds no shards yet; give --train and --validation")
    tool = [sys.executable, "-m", "data_tools"]
    subprocess.run(
        [*tool, "tokenizer", options.train, "--vocab-size", "2048", "--sample-mb", "8", "--out", model], check=True
    )
    train = options.train if options.beginning is None else cut_beginnings(options)
    for source, split in ((train, "train"), (options.validation, "validation")):
        subprocess.run(
            [*tool, "encode", source, "--tokenizer", model, "--out", data / split, "--overwrite"], check=True
        )


def cut_beginnings(options: argparse.Namespace) -> Path:
    """The first --beginning characters of each training document."""
    beginnings: Path = options.out / "beginnings.jsonl"
    with beginnings.open("w", encoding="utf-8") as file:
        for document in documents([options.train]):
            line = {"id": document.id, "text": document.text[: options.beginning], **document.metadata}
            file.write(json.dumps(line) + "\n")
    return beginnings


def run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Trains (or finishes) one arm with one seed, and evaluates it."""
    run_dir = options.out / f"{arm}-seed{seed}"
    settings = {
        "run_dir": run_dir,
        "seed": seed,
        "data.order_seed": options.order_seed,
        "data.train": options.out / "data" / "train",
        "data.validation": options.out / "data" / "validation",
    }
    words = [*ARMS[arm], *(f"{name}={value}" for name, value in settings.items()), *options.set]
    sets = [word for setting in words for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.parallel))}
    tool = [sys.executable, "-m", "infini_train.cli"]
    with (options.out / f"{arm}-seed{seed}.log").open("a") as log:
        subprocess.run([*tool, "train", "books", *sets], check=True, env=environment, stdout=log)
    print(f"{arm}, seed {seed}: trained", flush=True)
    command = [*tool, "eval", str(run_dir), "--lanes", "10", "--max-tokens", str(EVALUATED_TOKENS), "--json"]
    found = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {"arm": arm, "seed": seed, **json.loads(found.stdout), **summarise(metrics)}


EVALUATED_TOKENS = 409_600  # the first 10 windows of 4096 of each of ten books


def summarise(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed, memory, gates and the validation curve of a run."""
    speeds = [line["speed/tokens_per_s"] for line in metrics if "speed/tokens_per_s" in line]
    gates = [line for line in metrics if "gates/lowest" in line]
    return {
        "train_tokens": max(line.get("tokens", 0) for line in metrics),
        "train_tokens_per_s": statistics.median(speeds),
        "train_peak_memory_mb": max(line.get("speed/peak_memory_bytes", 0) for line in metrics) / 2**20,
        "gates": [gates[-1]["gates/lowest"], gates[-1]["gates/highest"]] if gates else None,
        "curve": [(line["step"], line["loss/validation"]) for line in metrics if "loss/validation" in line],
    }


def tabulate(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line each run, then mean and spread of each arm."""
    lines = [
        "| arm | seed | held-out loss | perplexity | bits a byte | training tok/s | peak memory (MB) | gates |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        gates = "-" if row["gates"] is None else f"{row['gates'][0]:.2f} to {row['gates'][1]:.2f}"
        lines.append(
            f"| {row['arm']} | {row['seed']} | {row['loss']:.4f} | {row['perplexity']:.2f} | {row['bits_per_byte']:.4f}"
            f" | {row['train_tokens_per_s']:,.0f} | {row['train_peak_memory_mb']:,.0f} | {gates} |"
        )
    for arm in dict.fromkeys(row["arm"] for row in rows):
        losses = [row["loss"] for row in rows if row["arm"] == arm]
        perplexities = [row["perplexity"] for row in rows if row["arm"] == arm]
        spread = max(losses) - min(losses)
        lines.append(
            f"| **{arm}** | mean of {len(losses)} | **{statistics.mean(losses):.4f}** (spread {spread:.4f})"
            f" | **{statistics.mean(perplexities):.2f}** | | | | |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss against steps, a thin line a seed."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for row in rows:
        steps, losses = zip(*row["curve"], strict=True)
        first = row["seed"] == min(other["seed"] for other in rows)
        axes.plot(steps, losses, color=COLOURS[row["arm"]], alpha=0.8, label=row["arm"] if first else None)
    axes.set(
        xlabel="step", ylabel="held-out loss (nats a token)", title="Books never seen, each read from its beginning"
    )
    axes.grid(alpha=0.3)
    axes.legend(title="attention, one line a seed")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
