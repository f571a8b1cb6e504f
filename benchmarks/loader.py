"""Loading: seconds to open a dataset of a million documents, and tokens a second of the reader against the trainer.

    python benchmarks/loader.py --out runs/loader

Writes a dataset of many short documents and one of few long ones (random bytes), opens the first as a run does (files
checked, index read, an epoch's order computed), reads windows of both by one thread, and trains the debug model for
some steps. Results: results.json, and a table on the console.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from infini_train.config.files import load_run
from infini_train.data.corpus import Corpus
from infini_train.data.lanes import LaneReader
from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import ByteTokenizer

STEPS = 60  # of the debug model


def write(folder: Path, documents: int, mean_tokens: int) -> Path:
    """Documents of random lengths around this mean; kept if it is there."""
    if not (folder / "manifest.json").exists():
        random = np.random.default_rng(0)
        tokens = random.integers(0, 256, 2 * mean_tokens)
        with ShardWriter(folder, ByteTokenizer(), overwrite=True) as writer:
            for number in tqdm(range(documents), desc=str(folder), unit=" documents", disable=None):
                length = int(random.integers(1, 2 * mean_tokens))
                writer.add(tokens[:length], n_bytes=length, id=str(number))
    return folder


def time_opening(folder: Path) -> float:
    """Median seconds until the first document is known."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        corpus = Corpus.of(Dataset.open(folder), seed=0)
        corpus.take(corpus.start())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def time_reading(folder: Path, lanes: int, window_tokens: int) -> float:
    """Median tokens per second, over windows."""
    reader = LaneReader(Corpus.of(Dataset.open(folder), seed=0), lanes, window_tokens)
    position, speeds = reader.start(), []
    for _ in range(200):
        begin = time.perf_counter()
        _, position = reader.next(position)
        speeds.append(lanes * window_tokens / (time.perf_counter() - begin))
    return statistics.median(speeds)


def time_training(folder: Path, out: Path) -> tuple[float, float]:
    """Median tokens per second of the debug config on one thread, and the share of a step that waits for data."""
    run = out / f"run-{os.getpid()}"
    settings = [f"run_dir={run}", f"data.train={folder}", "data.validation=null", "eval.every_steps=null"]
    settings += [f"train.max_steps={STEPS}", "log.every_steps=5", f"checkpoint.every_steps={STEPS}"]
    subprocess.run(
        [sys.executable, "-m", "infini_train.cli", "train", "debug", *(f"--set={setting}" for setting in settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "speed/step_s" in row][2:]
    share = statistics.median(row["seconds/data"] / row["speed/step_s"] for row in rows)
    return statistics.median(row["speed/tokens_per_s"] for row in rows), share


def main() -> None:
    """Writes results.json and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the datasets (about 1 GB) and the results")
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the dataset of many")
    options = parser.parse_args()
    train = load_run("debug").train
    many = write(options.out / "many", options.documents, 64)
    few = write(options.out / "few", 50, 200_000)
    trained, share = time_training(many, options.out)
    results = {
        "documents": options.documents,
        "open_s": time_opening(many),
        "train_tokens_per_s": trained,
        "data_share_of_step": share,
    }
    for name, folder in (("short", many), ("long", few)):
        results[f"read_{name}_tokens_per_s"] = time_reading(folder, train.batch_lanes, train.window_tokens)
        results[f"read_{name}_wide_tokens_per_s"] = time_reading(folder, 8, 8192)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print("| what | value | of the trainer |\n|---|---:|---:|")
    print(f"| open {options.documents:,} documents | {results['open_s']:.2f} s | |")
    print(f"| debug model trains | {trained:,.0f} tok/s | 1 |")
    print(f"| data in a step | {share:.2%} | |")
    for name, value in results.items():
        if name.startswith("read_"):
            print(f"| {name[5:-13]} documents read | {value:,.0f} tok/s | {value / trained:.0f} |")


if __name__ == "__main__":
    main()
