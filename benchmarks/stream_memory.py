"""Memory of `infini-train eval --stream` on one document, short and long: it must not grow with the length.

    python benchmarks/stream_memory.py runs/demo

Takes any trained run; the documents are random tokens of its vocabulary, which cost the same as text.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from infini_train.data.shards import Dataset, ShardWriter
from infini_train.data.tokenizer import load_tokenizer


def main() -> None:
    """Prints a line for each length, and the ratio of the last to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32_768, 1_048_576], metavar="TOKENS")
    options = parser.parse_args()
    found = [measure(options.run, length) for length in options.lengths]
    for row in found:
        print(f"{row['tokens']:>12,} tokens  {row['peak_memory_mb']:8.1f} MB  {row['tokens_per_s']:9,.0f} tok/s")
    print(f"memory, last to first: {found[-1]['peak_memory_mb'] / found[0]['peak_memory_mb']:.4f}")


def measure(run: Path, tokens: int) -> dict[str, float]:
    """Evaluates one document in a process of its own."""
    file = run / "tokenizer.model"
    tokenizer = load_tokenizer(file if file.is_file() else "byte")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "document"
        ids = np.random.default_rng(0).integers(4, tokenizer.vocab_size - 3, tokens)
        with ShardWriter(data, tokenizer) as writer:
            writer.add(ids, n_bytes=3 * tokens, id="random", source="random", metadata={})
        assert Dataset.open(data).manifest.tokens == tokens
        command = [
            sys.executable,
            "-m",
            "infini_train.cli",
            "eval",
            str(run),
            "--data",
            str(data),
            "--stream",
            "--json",
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
