"""Makes books of one fact: a pass key somewhere in up to millions of bytes; the summary is its digits.

    python benchmarks/key_books.py --out runs/key_books/8K.jsonl --count 20 --length 8K
    infini-train eval summarise models/passkey-delta --data runs/key_books/8K.jsonl --out runs/key_books/8K \\
        --separator " What is the pass key? The pass key is" --max-new-tokens 6

The shipped model was trained to answer that question (docs/passkey.md), so the whole pipeline can be tried with it
on books of any length, untrained for summaries as it is. Words, filler and places are those of the passkey test.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from infini_train.command_line import parse_length
from infini_train.data.synthetic.passkey import PasskeyWriter
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import ByteTokenizer


def main() -> None:
    """Writes one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="books")
    parser.add_argument("--length", type=parse_length, required=True, metavar="N", help="bytes of a book, as 8K or 1M")
    parser.add_argument("--wording", default="harbour", help="of the passkey test (default: harbour)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args()
    tokenizer = ByteTokenizer()
    writer = PasskeyWriter(tokenizer, find_wording(options.wording))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        for number in range(options.count):
            random = np.random.default_rng([options.seed, number])
            shorter = int(random.integers(0, 64))  # so that the question falls anywhere relative to segment edges
            text = writer.compose(random, options.length - shorter, number / max(options.count - 1, 1))
            book = tokenizer.decode(text.read(0, text.spans.question.start))
            key = "".join(map(str, text.digits))
            file.write(json.dumps({"id": f"key-{options.seed}-{number}", "book": book, "summary": key}) + "\n")


if __name__ == "__main__":
    main()
