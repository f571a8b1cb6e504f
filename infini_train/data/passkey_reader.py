"""Passkey texts as training windows: composed on the fly, a pure function of seed, step and lane.

A window holds one text, or several short ones one behind the other, each from a segment's edge on, so that gradients
reach from the answer back to the key. Lengths grow with the steps. Under pressure the segments that don't hold the key
write more into the memory, as if their text had been read many times: a window feels like a far longer one. This
augmentation is not in the paper.

Shapes: B lanes read by this rank, T window_tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from infini_train.config import PasskeyConfig
from infini_train.data.lanes import IGNORED, Batch
from infini_train.data.passkey import Passkey, PasskeyWriter, find_wording
from infini_train.data.tokenizer import ByteTokenizer

# Where the key lies: up to these shares of the texts anywhere, in the first segment's worth of filler, in the last two
# segments' worth; in the rest it shares a segment with the question, if both fit.
ANYWHERE, AT_START, BEFORE_END = 0.5, 0.65, 0.85
QUESTION_INSIDE = 0.8  # share of the texts whose question is not cut by a segment's edge


class _Window(NamedTuple):
    tokens_BT: np.ndarray
    labels_BT: np.ndarray
    starts_BT: np.ndarray
    weights_BT: np.ndarray
    loss_weights_BT: np.ndarray


@dataclass(frozen=True)
class Step:
    """Position of a `PasskeyReader`: windows read so far."""

    number: int

    def to_json(self) -> dict[str, Any]:
        """As plain values for json.dumps."""
        return {"step": self.number}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The position of a `to_json`."""
        return cls(int(tree["step"]))


class PasskeyReader:
    """Endless windows of passkey texts in bytes.

    Args:
        config: wording, lengths over time, weights of the losses, pressure.
        n_lanes: lanes of the global batch.
        window_tokens: positions of a lane in one batch, whole segments.
        segment_tokens: of the model.
        seed: of the texts.
        rows: the lanes that this rank reads.
    """

    corrupt_documents = 0

    def __init__(
        self, config: PasskeyConfig, n_lanes: int, window_tokens: int, segment_tokens: int, seed: int, rows: slice
    ) -> None:
        assert window_tokens % segment_tokens == 0
        self.config = config
        self.window_tokens, self.segment_tokens = window_tokens, segment_tokens
        self.rows = range(n_lanes)[rows]
        self._seed = seed
        self._writer = PasskeyWriter(ByteTokenizer(), find_wording(config.wording), config.digits)
        bare = self._writer.place(np.zeros(config.digits, np.int64), self._writer.min_tokens, 0)
        self._key_tokens = bare.spans.key.stop - bare.spans.key.start
        self._tail_tokens = bare.tokens - bare.spans.question.start

    def start(self) -> Step:
        """Before the first window."""
        return Step(0)

    def parse(self, tree: Mapping[str, Any]) -> Step:
        """The position of a `Step.to_json`."""
        return Step.from_json(tree)

    def next(self, position: Step) -> tuple[Batch, Step]:
        """The window behind a position, and the position behind the window."""
        shape = (len(self.rows), self.window_tokens)
        window = _Window(
            tokens_BT=np.full(shape, ByteTokenizer.pad_id, np.int64),
            labels_BT=np.full(shape, IGNORED, np.int64),
            starts_BT=np.zeros(shape, bool),
            weights_BT=np.zeros(shape, np.float32),
            loss_weights_BT=np.zeros(shape, np.float32),
        )
        step, n_bytes = position.number, 0
        drawn = self._draw_segments(np.random.default_rng([self._seed, step]), step)  # the same in all lanes
        for row, lane in enumerate(self.rows):
            random = np.random.default_rng([self._seed, step, 1 + lane])
            first, left = 0, self.window_tokens // self.segment_tokens
            while left >= self._least:
                segments = min(drawn, left)
                begin, stop = first * self.segment_tokens, (first + segments) * self.segment_tokens
                n_bytes += self._write_text(window, row, random, slice(begin, stop), step)
                first, left = first + segments, left - segments
        document_B = np.full(len(self.rows), step, np.int64)
        return Batch(**window._asdict(), document_B=document_B, n_bytes=float(n_bytes)), Step(step + 1)

    @property
    def _least(self) -> int:
        return min(self.config.min_segments, self.window_tokens // self.segment_tokens)

    def longest_segments(self, step: int) -> int:
        """Of the texts at this step; grows exponentially, as lengths are drawn log-uniformly."""
        config, most = self.config, self.window_tokens // self.segment_tokens
        done = (step - config.grow_from_step) / (config.grow_until_step - config.grow_from_step)
        return round(self._least * (most / self._least) ** min(1.0, max(0.0, done)))

    def _draw_segments(self, random: np.random.Generator, step: int) -> int:
        longest = self.longest_segments(step)
        return min(longest, int(math.exp(random.uniform(math.log(self._least), math.log(longest + 1)))))

    def _write_text(self, window: "_Window", row: int, random: np.random.Generator, place: slice, step: int) -> int:
        """One text into these columns, from their first one on; returns its bytes."""
        text = self._compose(random, (place.stop - place.start) // self.segment_tokens)
        columns, ids = slice(place.start, place.start + text.tokens), text.ids
        window.starts_BT[row, place.start] = True
        window.tokens_BT[row, columns] = np.concatenate(([ByteTokenizer.bos_id], ids[:-1]))
        window.labels_BT[row, columns] = ids
        window.loss_weights_BT[row, columns] = self._weigh_losses(text)
        window.weights_BT[row, columns] = self._weigh_writes(text, random, step)
        return text.tokens

    def _compose(self, random: np.random.Generator, segments: int) -> Passkey:
        """A text that ends in the last of so many segments; the question may reach back into the one before."""
        writer, size = self._writer, self.segment_tokens
        kind, inside = random.random(), random.random() < QUESTION_INSIDE
        beside = kind >= BEFORE_END and self._key_tokens + self._tail_tokens < size
        least = 1 + (self._key_tokens + self._tail_tokens if beside else self._tail_tokens if inside else 0)
        last_tokens = int(random.integers(min(least, size), size + 1))
        length = max((segments - 1) * size + last_tokens, writer.min_tokens)
        filler = length - writer.min_tokens
        if beside:
            reach = last_tokens - self._tail_tokens - self._key_tokens
        else:
            reach = filler if kind < ANYWHERE else size if kind < AT_START else 2 * size
        shift = int(random.integers(0, min(reach, filler) + 1))
        before = shift if kind < AT_START else filler - shift  # anywhere: either way
        return writer.place(random.integers(0, 10, self.config.digits), length, before)

    def _weigh_losses(self, text: Passkey) -> np.ndarray:
        """Every text counts alike, whatever its length; within it, the shares of the config."""
        config, spans = self.config, text.spans
        weights = np.full(text.tokens, config.text_weight / text.tokens, np.float32)
        weights[spans.second_mention] = config.key_weight / config.digits
        weights[spans.answer] = config.answer_weight / config.digits
        return weights

    def _weigh_writes(self, text: Passkey, random: np.random.Generator, step: int) -> np.ndarray:
        """1, or more in segments that hold nothing of the key, as if their text had been read that many times."""
        config, size, key = self.config, self.segment_tokens, text.spans.key
        weights = np.ones(text.tokens, np.float32)
        drawn, share = random.random(2)
        if step < config.grow_until_step or config.pressure == 1 or drawn >= config.pressure_share:
            return weights
        longer = config.pressure * self.window_tokens / text.tokens  # than this text it may feel
        segment = np.arange(text.tokens) // size
        holds_key = (segment >= (key.start + 1) // size) & (segment <= key.stop // size)  # behind the bos
        weights[(segment > 0) & ~holds_key] = longer**share
        return weights
