"""Writes texts of the needle tests, to train a tokenizer on them (docs/needles.md).

    python benchmarks/needle_texts.py --out runs/needles/texts.jsonl
    infini-data tokenizer runs/needles/texts.jsonl --vocab-size 1500 --out runs/needles/tokenizer.model

A line a text, of the tasks with a value each needle in turn, in varied hay; the same seed gives the same texts. A small
vocabulary then has things and words of the hay whole. There are no variables: their names are any letters, and pieces
of them would fill it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from infini_train.config.data import VALUE_EACH
from infini_train.data.synthetic.haystack import HaystackSource
from infini_train.data.synthetic.needles import EncodedNeedles, draw_needles
from infini_train.data.tokenizer import ByteTokenizer

NEEDLES, DIGITS, HAY_TOKENS = 8, 2, 1024


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--count", type=int, default=2000, help="of texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in write_texts(options.count, options.seed))


def write_texts(count: int, seed: int) -> Iterator[str]:
    """So many texts."""
    byte = ByteTokenizer()
    hay = HaystackSource("varied", byte)
    for number in range(count):
        random = np.random.default_rng([seed, number])
        encoded = EncodedNeedles(byte, draw_needles(random, VALUE_EACH[number % len(VALUE_EACH)], NEEDLES, DIGITS))
        places = np.sort(random.integers(0, HAY_TOKENS + 1, len(encoded.needles.sentences)))
        text = encoded.place(hay.draw([seed, number]), places.tolist(), HAY_TOKENS)
        yield byte.decode(text.read(0, text.tokens))


if __name__ == "__main__":
    main()
