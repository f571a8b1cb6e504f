"""A dataset of two words with a SentencePiece tokenizer of its own."""

from pathlib import Path

import sentencepiece

from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import SentencePieceTokenizer


def write_cat(folder: Path) -> SentencePieceTokenizer:
    """Trains FOLDER/t.model and writes FOLDER/set; the tokenizer."""
    with (folder / "t.model").open("wb") as file:
        texts = iter(["the cat sat on the mat"] * 9)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=file, vocab_size=14, minloglevel=2
        )
    tokenizer = SentencePieceTokenizer(folder / "t.model")
    with ShardWriter(folder / "set", tokenizer) as writer:
        writer.add(tokenizer.encode("the cat"), n_bytes=7, id="a")
    return tokenizer
