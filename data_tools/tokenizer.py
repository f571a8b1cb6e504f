"""Train a SentencePiece tokenizer that gives every text back exactly."""

import contextlib
import heapq
import io
import os
import random
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from data_tools.problems import SettingError
from data_tools.progress import elapsed_time
from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.data.writer import TargetExistsError, explain_disk_errors

PIECE_BYTES = 4000  # SentencePiece leaves out longer "sentences"
META_PIECES = 260  # unk, bos, eos, pad and one for each byte


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How to train."""

    vocab_size: int = 32_000
    kind: Literal["bpe", "unigram"] = "bpe"
    sample_bytes: int = 100_000_000  # of text, drawn evenly from all of it
    character_coverage: float = 0.9995  # characters outside it are spelled in bytes
    threads: int = 0  # 0: one per core
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size <= META_PIECES:
            template = "{vocab_size}: {given} is too small; {reserved} are taken by bytes and special tokens"
            raise SettingError(template, given=self.vocab_size, reserved=META_PIECES)
        if not 0.9 <= self.character_coverage <= 1:
            raise SettingError("{character_coverage}: must lie between 0.9 and 1")
        if self.sample_bytes < 1:
            raise SettingError("{sample_bytes}: must be positive")
        if self.threads < 0:
            raise SettingError("{threads}: must not be negative")


def cut_text(text: str, limit_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Pieces of at most `limit_bytes`, cut after line ends where possible; joined they are the text."""
    start = 0
    while start < len(text):
        piece = text[start : start + limit_bytes]
        data = piece.encode("utf-8")
        if len(data) > limit_bytes:
            piece = data[:limit_bytes].decode("utf-8", errors="ignore")  # leaves out the character that was cut
        if start + len(piece) < len(text):
            piece = piece[: piece.rfind("\n") + 1] or piece
        yield piece
        start += len(piece)


def sample_pieces(texts: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """An even sample of the texts' pieces, in order, of at most `sample_bytes`: those with the smallest random keys."""
    draw = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap, largest key first
    size, number, limit = 0, 0, 1.0  # keys of `limit` and above are skipped: a piece with that key was dropped already
    for text in texts:
        for piece in cut_text(text):
            number += 1
            key, n_bytes = draw.random(), len(piece.encode("utf-8"))
            if key >= limit:
                continue
            heapq.heappush(kept, (-key, number, piece))
            size += n_bytes
            while size > sample_bytes and len(kept) > 1:
                key, _, piece = heapq.heappop(kept)
                size, limit = size - len(piece.encode("utf-8")), -key
    return [piece for _, _, piece in sorted(kept, key=lambda item: item[1])]


def train_tokenizer(
    texts: Iterable[str], out: Path | str, options: TokenizerOptions, *, overwrite: bool = False
) -> int:
    """Train on a sample of the texts and write the .model; returns the number of bytes it was trained on.

    The model is lossless: no normalisation, no added space, white space kept, unknown characters spelled in bytes.

    Raises:
        TargetExistsError: `out` is there already, and `overwrite` is off.
        ConfigError: too little text for the vocabulary, or the disk is full.
    """
    out = Path(out)
    if out.suffix != ".model":
        raise ConfigError(f"{out}: name the tokenizer's file *.model")
    if out.exists() and not overwrite:
        raise TargetExistsError(f"{out}: is there already; choose another name")
    sample = sample_pieces(texts, options.sample_bytes, options.seed)
    with elapsed_time(f"train on {sum(map(len, sample)) / 1e6:,.0f} million characters"):
        model = _train(sample, options)
    with explain_disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, model)
    return sum(len(piece.encode("utf-8")) for piece in sample)


def _train(sample: list[str], options: TokenizerOptions) -> bytes:
    """The model's bytes."""
    result = io.BytesIO()
    try:
        with _default_signals():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sample),
                model_writer=result,
                model_type=options.kind,
                vocab_size=options.vocab_size,
                character_coverage=options.character_coverage,
                num_threads=options.threads or os.cpu_count() or 1,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                max_sentence_length=PIECE_BYTES + 4,
                train_extremely_large_corpus=options.kind == "unigram" and options.sample_bytes > 1_000_000_000,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise _explain(str(error), options) from error
    return result.getvalue()


def _explain(message: str, options: TokenizerOptions) -> ConfigError:
    """SentencePiece's complaint, in the user's terms."""
    if largest := re.search(r"too high .*<= (\d+)", message):
        template = "{vocab_size}: too little text for {given} tokens; use {largest} or fewer, or give more text"
        return SettingError(template, given=options.vocab_size, largest=largest[1])
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        hint = "use more than {needed}, or lower {character_coverage}"
        template = f"{{vocab_size}}: {{given}} can't hold the text's characters; {hint}"
        return SettingError(template, given=options.vocab_size, needed=needed[1])
    return ConfigError(f"SentencePiece could not train on this text: {message.splitlines()[0]}")


@contextlib.contextmanager
def _default_signals() -> Iterator[None]:
    """Ctrl-C ends the process at once: Python would react only after the C++ training. Nothing is written yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
