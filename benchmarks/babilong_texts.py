"""Writes BABILong texts, to train a tokenizer on them (docs/babilong.md).

    python benchmarks/babilong_texts.py --out runs/babilong/texts.jsonl
    infini-data tokenizer runs/babilong/texts.jsonl --vocab-size 1500 --out runs/babilong/tokenizer.model

A line a text, each of the tasks in turn; the same seed gives the same texts. A small vocabulary then has the words of
the facts, and of varied hay, whole.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from infini_train.data.synthetic.babi import TASKS, draw_story
from infini_train.data.synthetic.babilong import EncodedStory, SentenceHay
from infini_train.data.tokenizer import ByteTokenizer

MAX_FACTS, HAY_BYTES = 20, 1024


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--haystack", default="varied", help="as of data.synthetic (default: %(default)s)")
    parser.add_argument("--count", type=int, default=2000, help="of texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        texts = write_texts(options.haystack, options.count, options.seed)
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_texts(haystack: str, count: int, seed: int) -> Iterator[str]:
    """Texts of all tasks in this hay."""
    byte = ByteTokenizer()
    sentences = SentenceHay(haystack, byte)
    for number in range(count):
        random = np.random.default_rng([seed, number])
        story = EncodedStory(byte, draw_story(random, TASKS[number % len(TASKS)], MAX_FACTS))
        text = story.place(random, sentences, sentences.draw([seed, number]), HAY_BYTES)
        yield byte.decode(text.read(0, text.tokens))


if __name__ == "__main__":
    main()
