"""Encoding a corpus, side by side: `infini-data encode`, SentencePiece's own ways, and Megatron-LM's preprocess_data.

    python benchmarks/data.py books.jsonl --tokenizer tokenizer.model --megatron Megatron-LM

Every contender reads the same JSON lines (a field "text") and writes token ids; those of SentencePiece write the same
shards as infini-data. Each is run on the corpus and on its first line, in turns, and the time of the latter is taken
off: imports don't count. On a machine with other work, look at the tokens per CPU second. The peak is the largest
resident memory of one process. `--mb` repeats the file up to a size.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Prints a table: medians of the repeats, and ratios to the first contender."""
    options = parse()
    if options.child:
        run_child(options)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        full, first = Path(folder) / "full.jsonl", Path(folder) / "first.jsonl"
        repeat(options.corpus, full, first, options.mb * 1_000_000)
        print(f"{full.stat().st_size / 1e6:.0f} MB, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        found: dict[str, list[tuple[float, float, float, int]]] = {}
        for turn in range(options.repeats):
            for name, command in contenders(options).items():
                start, _ = measure(command, first, Path(folder) / "out", options)
                cost, tokens = measure(command, full, Path(folder) / "out", options)
                rates = tokens / (cost.wall_s - start.wall_s), tokens / (cost.cpu_s - start.cpu_s)
                found.setdefault(name, []).append((*rates, cost.peak_mb, tokens))
                load = os.getloadavg()[0]
                print(f"turn {turn}, load {load:.1f}: {name}: {cost}, of it to start: {start}", file=sys.stderr)
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    first_wall, first_cpu, _, _ = next(iter(medians.values()))
    print(
        "| | tokens | tokens/s | ratio | tokens per CPU second | ratio | peak RSS, MB |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    for name, (wall, cpu, peak, tokens) in medians.items():
        ratios = wall / first_wall, cpu / first_cpu
        print(f"| {name} | {tokens:,.0f} | {wall:,.0f} | {ratios[0]:.2f} | {cpu:,.0f} | {ratios[1]:.2f} | {peak:.0f} |")


class Cost(NamedTuple):
    """Of one run; the CPU time of all its processes, the memory of the largest."""

    wall_s: float
    cpu_s: float
    peak_mb: float

    def __str__(self) -> str:
        return f"{self.wall_s:.1f} s, {self.cpu_s:.1f} CPU s, {self.peak_mb:.0f} MB"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--python-path", default="", help="more folders of modules that the checkout needs")
    parser.add_argument("--scratch", type=Path, help="folder for what is written (default: the system's)")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def repeat(corpus: Path, full: Path, first: Path, size: int) -> None:
    """The file again and again, up to `size` bytes at whole lines; and its first line."""
    with full.open("wb") as out:
        while out.tell() < size:
            with corpus.open("rb") as lines:
                for number, line in enumerate(lines):
                    if out.tell() == 0 and number == 0:
                        first.write_bytes(line)
                    if out.tell() >= size:
                        break
                    out.write(line)


def contenders(options: argparse.Namespace) -> dict[str, Callable[[Path, Path], list[str]]]:
    """By name: the command for a source and a folder to write."""
    model, workers = str(options.tokenizer.resolve()), str(options.workers)

    def ours(number: str) -> Callable[[Path, Path], list[str]]:
        tool = [sys.executable, "-m", "data_tools", "encode"]
        return lambda source, out: [*tool, str(source), "--tokenizer", model, "--out", str(out), "--workers", number]

    def child(name: str) -> Callable[[Path, Path], list[str]]:
        own = [sys.executable, __file__, "--tokenizer", model, "--workers", workers, "--child", name]
        return lambda source, out: [*own, str(source), "--out", str(out)]

    found = {f"infini-data, {workers} workers": ours(workers), "infini-data, 1 worker": ours("1")}
    found |= {name: child(name) for name in CHILDREN}
    if options.megatron:
        script = str(options.megatron / "tools" / "preprocess_data.py")
        keys = ["--json-keys", "text", "--append-eod", "--workers", workers]
        kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
        found[f"Megatron-LM, {workers} workers"] = lambda source, out: [
            *[sys.executable, script, "--input", str(source), "--output-prefix", str(out / "m"), *keys, *kind]
        ]
    return found


def measure(
    command: Callable[[Path, Path], list[str]], source: Path, out: Path, options: argparse.Namespace
) -> tuple[Cost, int]:
    """What it cost, and the tokens written."""
    shutil.rmtree(out, ignore_errors=True)
    words = command(source, out)
    if options.megatron and str(options.megatron) in words[1]:
        out.mkdir()
    path = [str(ROOT), str(options.megatron or ""), options.python_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    begin = time.monotonic()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    cost = Cost(time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
    assert process.stderr is not None
    if status:
        sys.exit(f"{' '.join(words)} failed:\n{process.stderr.read().decode()[-2000:]}")
    process.stderr.close()
    manifest = out / "manifest.json"
    if manifest.exists():
        tokens = json.loads(manifest.read_text())["tokens"]
    else:
        tokens = (out / "m_text_document.bin").stat().st_size // 2  # with one end of text a document
    return cost, tokens


def run_child(options: argparse.Namespace) -> None:
    """One of SentencePiece's ways, with reading and writing as infini-data does it."""
    from infini_train.data.shards import ShardWriter
    from infini_train.data.tokenizer import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer(options.tokenizer)
    encode = CHILDREN[options.child]
    with options.corpus.open("rb") as lines, ShardWriter(options.out, tokenizer) as writer:
        for number, line in enumerate(lines):
            text = json.loads(line)["text"]
            ids = encode(tokenizer._model, text, options.workers)
            writer.add(ids, n_bytes=len(text.encode()), id=str(number))


def _by_document(model: Any, text: str, workers: int) -> np.ndarray:
    return model.encode(text, return_type="numpy")


def _by_lines(model: Any, text: str, workers: int) -> np.ndarray:
    """Fast, but not the ids of the whole text: a piece may hold a line end in its midst."""
    return np.concatenate(model.encode(text.splitlines(True), return_type="numpy", num_threads=workers))


CHILDREN = {"SentencePiece, by document": _by_document, "SentencePiece batch encoder, lines": _by_lines}


if __name__ == "__main__":
    main()
