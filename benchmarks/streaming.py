"""Speed and memory of streaming evaluation after 32K and after a million tokens of one document.

    python benchmarks/streaming.py models/passkey-linear

A process reads the document as `infini-train eval --stream` does and keeps its state at 32K tokens and near the
end. Then it reads on from both places in turn, forward by forward, so that whatever else the machine does meets both
alike: speed is the median over these forwards. Resident memory is noted while the document is read through. The tokens
are random, which costs the same as text. The result is kept in benchmarks/results/streaming.json, the table stands in
docs/results/streaming.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from page import RESULTS, ResultPage, as_table, keep_result

EARLY_TOKENS = 32 * 1024
LEAST_SPEED, MOST_MEMORY = 0.95, 1.05  # of those at 32K


def main() -> None:
    """Measures in processes of their own, prints and keeps the result; exit code 1 if the goals are missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a run's folder or a checkpoint")
    parser.add_argument("--tokens", type=int, default=1024 * 1024, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # the process that measures
    parser.add_argument("--report", action="store_true", help="only write the table")
    options = parser.parse_args()
    if options.report:
        PAGE.write()
        return
    if options.model is None:
        parser.error("give the model to measure, or --report")
    if options.alone:
        print(json.dumps(measure(options.model, options.tokens)))
        return
    command = [sys.executable, __file__, str(options.model), "--tokens", str(options.tokens), "--alone"]
    runs = []
    for _ in range(options.repeats):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(format_run(runs[-1]), flush=True)
    result = summarise(runs, options.model.name, options.tokens)
    keep_result("streaming", result)
    PAGE.write()
    print(f"speed at the end {result['speed_ratio']:.4f} of that at 32K, memory {result['memory_ratio']:.4f}")
    sys.exit(result["speed_ratio"] < LEAST_SPEED or result["memory_ratio"] > MOST_MEMORY)


def measure(model: Path, tokens: int) -> dict[str, float]:
    """Reads one document through, then on from 32K tokens and from near its end in turn."""
    from infini_train.parallel import device

    device.prepare()
    from infini_train.data.corpus import Corpus
    from infini_train.data.lanes import LaneReader
    from infini_train.data.shards import Dataset, ShardWriter
    from infini_train.eval.perplexity_command import STREAM_SEGMENTS
    from infini_train.inference.loading import open_trained

    trained = open_trained(model)
    window = STREAM_SEGMENTS * (trained.config.model.segment_tokens or 64)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "document"
        ids = np.random.default_rng(0).integers(4, trained.tokenizer.vocab_size - 3, tokens)
        with ShardWriter(data, trained.tokenizer) as writer:
            writer.add(ids, n_bytes=tokens, id="random")
        reader = LaneReader(Corpus.of(Dataset.open(data), seed=None, epochs=1), 1, window)
        early_at, late_at = EARLY_TOKENS // window, (tokens - EARLY_TOKENS) // window
        place: Any = (reader.start(), trained.stages.initial_carried(1, 1))
        kept, resident, clock = [], [], time.perf_counter()
        for forward in range(late_at + 1):
            if forward in (early_at, late_at):
                kept.append(place)
                resident.append(resident_bytes())
            place = read_on(trained.stages, reader, place)
        whole_s = time.perf_counter() - clock
        seconds: list[list[float]] = [[], []]
        for pair in range(EARLY_TOKENS // window):
            for which in (0, 1) if pair % 2 else (1, 0):
                clock = time.perf_counter()
                kept[which] = read_on(trained.stages, reader, kept[which])
                seconds[which].append(time.perf_counter() - clock)
    return {
        "early_tokens_per_s": window / statistics.median(seconds[0]),
        "late_tokens_per_s": window / statistics.median(seconds[1]),
        "early_resident_mb": resident[0] / 2**20,
        "late_resident_mb": resident[1] / 2**20,
        "whole_tokens_per_s": late_at * window / whole_s,
    }


def read_on(stages: Any, reader: Any, place: tuple[Any, Any]) -> tuple[Any, Any]:
    """Reads one window; a place is a position in the document and the memory there."""
    import torch

    from infini_train.parallel.pipeline import cut_micro_batches, run_window

    batch, position = reader.next(place[0])
    with torch.no_grad():
        return position, run_window(stages, stages, cut_micro_batches(batch, 1), place[1])[1]


def resident_bytes() -> int:
    """Memory of this process, now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def summarise(runs: list[dict[str, float]], model: str, tokens: int) -> dict[str, Any]:
    """Medians of the ratios, with what they come from."""
    return {
        "model": model,
        "tokens": tokens,
        "speed_ratio": statistics.median(run["late_tokens_per_s"] / run["early_tokens_per_s"] for run in runs),
        "memory_ratio": statistics.median(run["late_resident_mb"] / run["early_resident_mb"] for run in runs),
        "runs": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
    }


def format_run(run: dict[str, float]) -> str:
    return (
        f"32K: {run['early_tokens_per_s']:9,.0f} tok/s {run['early_resident_mb']:7.1f} MB   end:"
        f" {run['late_tokens_per_s']:9,.0f} tok/s {run['late_resident_mb']:7.1f} MB"
    )


def tabulate() -> str:
    """Speed and memory after 32K tokens and near the end, a row for each run."""
    found = json.loads((RESULTS / "streaming.json").read_text(encoding="utf-8"))
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
    end = f"{found['tokens'] // 2**20}M"
    head = ["tokens/s at 32K", f"near {end}", "ratio", "resident MB at 32K", f"near {end}", "ratio"]
    return as_table(head, rows)


PAGE = ResultPage("streaming", "benchmarks/streaming.py", {"streaming": tabulate})


if __name__ == "__main__":
    main()
