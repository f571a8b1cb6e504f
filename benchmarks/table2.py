"""The paper's Table 2 at small scale: attention variants on long books, with equal parameters, tokens and tuning.

    python benchmarks/table2.py --train train.jsonl.gz --validation validation.jsonl.gz --test test.jsonl.gz

Any long documents will do. Encodes them; trains configs/run/table2.yaml with every arm and learning rate; chooses each
arm's rate by the validation books, and trains it with more seeds. A seed sets the initial weights and the order of the
books, the same order for every arm. The beginnings of the held-out books are read one by one, streamed. Each run
becomes a file in benchmarks/results/table2/; a run whose file is there is not made again, so that an interrupted
benchmark resumes. The tables and the plot of docs/results/table2.md are made from the files; with --report nothing else
is done.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.readers import documents
from infini_train.atomic_files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "benchmarks" / "results" / "table2"
RATES = ("3e-3", "6e-3")  # tried by every arm with the first seed
SEEDS = (0, 1, 2)
BOOKS, BOOK_CHARACTERS = {"validation": 3, "test": 10}, 100_000  # the first of each file, and of each book
VOCABULARY, SAMPLE_MB = 1024, 4

XL = ["model.attention.kind=transformer_xl", "model.attention.cache_tokens=64"]
MEMORIZING = ["model.attention.kind=memorizing", "model.attention.cache_tokens=64", "model.attention.top_k=32"]
RMT = ["model.attention.kind=rmt"]
GATED = ["update=gated_delta", "read=token", "read_norm=true"]
CONVOLVED = ["model.attention.conv_tokens=4"]
NO_MEMORY = ["model.attention.gate_init=-30", "optim.rules=[{match: layers.*.attention.gate, train: false}]"]  # closed
MIXED = """{kind: mixed, pattern: [memory, near], variants: {
  near: {kind: transformer_xl, segment_tokens: 64, cache_tokens: 64},
  memory: {kind: infini, segment_tokens: 64, update: gated_delta, read: token, read_norm: true}}}"""
ARMS = {  # name -> what differs from configs/run/table2.yaml
    "infini-linear": [],
    "infini-delta": ["model.attention.update=delta"],
    "infini-gated": [f"model.attention.{setting}" for setting in GATED],
    "mixed": [f"model.attention={' '.join(MIXED.split())}"],
    "transformer_xl": XL,
    "memorizing": [*MEMORIZING, "model.attention.stored_tokens=2048"],
    "rmt": [*RMT, "model.attention.memory_tokens=8"],
    "local": ["model.attention.kind=local"],
    "full": ["model.attention.kind=full"],
    # What a convolution of queries and keys gives without a memory, and a memory beside it.
    "local-conv": [*CONVOLVED, *NO_MEMORY],
    "window-conv": [*CONVOLVED, *NO_MEMORY, "model.attention.overlap_tokens=64"],
    "infini-linear-conv": CONVOLVED,
    "infini-gated-conv": [*CONVOLVED, *(f"model.attention.{setting}" for setting in GATED)],
}


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    rate: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.rate}-{self.seed}"

    @property
    def settings(self) -> list[str]:
        return [*ARMS[self.arm], f"optim.lr={self.rate}", f"seed={self.seed}"]


def main() -> None:
    """Makes what is missing, then reports."""
    options = parse()
    if not options.report:
        prepare(options)
        for run in plan(options.arms):
            make(options, run)
        for arm in options.arms:
            for seed in SEEDS[1:]:
                make(options, Run(arm, best_rate(arm), seed))
    from table2_report import write_report  # matplotlib is not needed before

    write_report()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}", metavar="FILE", help="long documents (first time only)")
    parser.add_argument("--out", type=Path, default=Path("runs/table2"), help="data and runs (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--report", action="store_true", help="only write tables and plots from the files")
    return parser.parse_args()


def plan(arms: list[str]) -> list[Run]:
    """The runs that tune: the same for every arm."""
    return [Run(arm, rate, SEEDS[0]) for rate in RATES for arm in arms]


def best_rate(arm: str) -> str:
    """The arm's learning rate with the lowest loss on the validation books."""
    found = {rate: load(Run(arm, rate, SEEDS[0]))["validation"]["loss"] for rate in RATES}
    return min(found, key=lambda rate: found[rate])


def load(run: Run) -> dict[str, Any]:
    """What a finished run found."""
    found: dict[str, Any] = json.loads((FILES / f"{run.name}.json").read_text(encoding="utf-8"))
    return found


def prepare(options: argparse.Namespace) -> None:
    """A tokenizer of 1024 pieces and the shards, unless they are there."""
    model = options.out / "tokenizer.model"
    sources = {"train": options.train, "validation": options.validation, "test": options.test}
    missing = [split for split in sources if not (folder_of(options, split) / "manifest.json").exists()]
    if missing and not all(sources.values()):
        sys.exit(
            f"error: {options.out / 'data'} holds no shards for {missing[0]} yet; give --train, --validation and --test"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    tool = [sys.executable, "-m", "data_tools"]
    if not model.exists():
        words = ["--vocab-size", str(VOCABULARY), "--sample-mb", str(SAMPLE_MB), "--out", str(model)]
        subprocess.run([*tool, "tokenizer", options.train, *words], check=True)
    for split in missing:
        source = Path(sources[split])
        if split != "train":
            source = cut_books(source, options.out / f"{split}.jsonl", BOOKS[split])
        words = ["--tokenizer", str(model), "--out", str(folder_of(options, split)), "--overwrite"]
        subprocess.run([*tool, "encode", str(source), *words], check=True)


def folder_of(options: argparse.Namespace, split: str) -> Path:
    """Where a split's shards lie; its name says how held-out books were cut."""
    name = split if split == "train" else f"{split}-{BOOKS[split]}x{BOOK_CHARACTERS}"
    return Path(options.out) / "data" / name


def cut_books(source: Path, target: Path, count: int) -> Path:
    """A file of the first books' beginnings."""
    with target.open("w", encoding="utf-8") as file:
        for document in islice(documents([str(source)]), count):
            file.write(json.dumps({"id": document.id, "text": document.text[:BOOK_CHARACTERS]}) + "\n")
    return target


def make(options: argparse.Namespace, run: Run) -> None:
    """Trains (or finishes) a run, evaluates it, and writes its file, unless it is there."""
    path = FILES / f"{run.name}.json"
    if path.exists():
        return
    run_dir = options.out / run.name
    places = [f"run_dir={run_dir}", f"data.train={options.out / 'data' / 'train'}"]
    sets = [word for setting in [*run.settings, *places] for word in ("--set", setting)]
    tool = [sys.executable, "-m", "infini_train.cli"]
    was_begun = (run_dir / "metrics.jsonl").exists()  # then the final time says nothing about the whole run
    with (options.out / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen([*tool, "train", "table2", *sets], stdout=log, env=one_thread())
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"error: {run.name} failed; see {options.out / 'log.txt'}")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = max(line.get("tokens", 0) for line in metrics)
    found = {
        "arm": run.arm,
        "rate": run.rate,
        "seed": run.seed,
        "settings": run.settings,
        **describe(run_dir),
        "train_tokens": tokens,
        "train_tokens_per_cpu_s": None if was_begun else tokens / (usage.ru_utime + usage.ru_stime),
        "train_peak_rss_bytes": usage.ru_maxrss * 1024,
        "train_loss": statistics.mean([line["loss/train"] for line in metrics if "loss/train" in line][-5:]),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, one thread, shared",
    }
    for split in BOOKS:
        found[split] = evaluate(folder_of(options, split), run_dir, run_dir / "eval" / split)
    FILES.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    print(f"{run.name}: validation {found['validation']['loss']:.4f}, test {found['test']['loss']:.4f}", flush=True)


def evaluate(data: Path, run_dir: Path, folder: Path) -> dict[str, Any]:
    """Losses of books, each read from its beginning with its memory carried along."""
    command = [sys.executable, "-m", "infini_train.cli", "eval", "context", str(run_dir), "--data", str(data)]
    command += ["--contexts", "64", "--targets", "1", "--out", str(folder), "--quiet"]  # by position alone
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=one_thread())
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    books = [record for record in records if "bucket_losses" in record]
    return {
        "loss": results["whole"]["loss"],
        "perplexity": results["whole"]["perplexity"],
        "positions": results["positions"],
        "books": {book["name"]: [sum(book["bucket_losses"]), sum(book["bucket_tokens"])] for book in books},
    }


def one_thread() -> dict[str, str]:
    """The environment of a run."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def describe(run_dir: Path) -> dict[str, Any]:
    """Sizes of a trained model, and what it really carries from window to window."""
    from infini_train.parallel import device

    device.prepare()  # before anything imports megatron-core, which would warn
    import torch

    from infini_train.inference.loading import open_trained
    from infini_train.model.flops import count_parameters, memory_numbers
    from infini_train.ops.state import name_leaves

    trained = open_trained(run_dir)
    model, window = trained.model, trained.config.train.window_tokens
    tokens_BT = torch.randint(0, model.config.vocab_size, (1, window))
    with torch.no_grad():
        grid = model.make_grids(torch.zeros(1, window, dtype=torch.bool), torch.ones(1, window), None)
        kept = model.carry_over(model.decode(tokens_BT, grid, None)[1])
    return {
        "parameters": count_parameters(model.config),
        "memory_numbers": memory_numbers(model.config),
        "carried_bytes": sum(leaf.tensor.nbytes for state in kept or () for leaf in name_leaves(state, "")),
    }


if __name__ == "__main__":
    main()
