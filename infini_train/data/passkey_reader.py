"""Passkey texts as training windows: composed on the fly, a pure function of seed, step and lane.

A window holds one text, or several short ones one behind the other, each from a segment's edge on, so that gradients
reach from the answer back to the key. Texts grow while the loss is low; if keys of few digits are to come, with these
only. When they have grown, some come under pressure (`pressure.py`): segments that don't hold the key write more.

Shapes: B lanes read by this rank, T window_tokens.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from infini_train.config.data import PasskeyConfig
from infini_train.config.errors import ConfigError
from infini_train.data.lanes import IGNORED, Batch
from infini_train.data.passkey import Passkey, PasskeyWriter
from infini_train.data.passkey_wordings import SENTENCES, WORDS, PasskeyText, find_wording
from infini_train.data.pressure import weigh_writes
from infini_train.data.tokenizer import ByteTokenizer

# Where the key lies: up to these shares of the texts anywhere, in the first segment's worth of filler, in the last two
# segments' worth; in the rest it shares a segment with the question, if both fit.
ANYWHERE, AT_START, BEFORE_END = 0.5, 0.65, 0.85
START_LOSS, MEMORY = 10.0, 0.9  # of the running mean of the loss
GROWTH = 1.05, 0.1  # a step: segments times this, and this many more
# Share of the grown texts whose question is not cut by a segment's edge; before, all. A drawn question that is longer
# than a segment ends at an edge instead.
QUESTION_INSIDE = 0.8
SENTENCES_DRAWN = 2, 8  # of which a varied filler consists
WORDS_DRAWN = 2, 9  # of a sentence without sense
NONSENSE = 0.5  # share of such sentences: the others are so few that a model knows them all by heart


class _Window(NamedTuple):
    tokens_BT: np.ndarray
    labels_BT: np.ndarray
    starts_BT: np.ndarray
    weights_BT: np.ndarray
    loss_weights_BT: np.ndarray


class _Stage(NamedTuple):
    few_digits: bool
    grown: bool  # as long as a window


@dataclass(frozen=True)
class Progress:
    """Position of a `PasskeyReader`.

    Attributes:
        step: windows read.
        longest: segments of the longest texts.
        loss: its running mean.
        few_digits: keys have few different digits now.
    """

    step: int
    longest: float
    loss: float
    few_digits: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain values for json.dumps."""
        return vars(self)

    def learned(self, loss: float) -> "Progress":
        """When its last window was learned with this loss."""
        return dataclasses.replace(self, loss=MEMORY * self.loss + (1 - MEMORY) * loss)

    def grown(self, most: float) -> "Progress":
        """With longer texts, up to so many segments."""
        return dataclasses.replace(self, longest=min(most, self.longest * GROWTH[0] + GROWTH[1]))


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
    learns = True

    def __init__(
        self, config: PasskeyConfig, n_lanes: int, window_tokens: int, segment_tokens: int, seed: int, rows: slice
    ) -> None:
        assert window_tokens % segment_tokens == 0
        self.config = config
        self.window_tokens, self.segment_tokens = window_tokens, segment_tokens
        self.rows = range(n_lanes)[rows]
        self._seed = seed
        self._most = window_tokens // segment_tokens
        self._least = min(config.min_segments, self._most)
        self._writer = PasskeyWriter(ByteTokenizer(), find_wording(config.wording), config.digits)
        least_tokens = self._writer.without_intro().min_tokens
        if self._least * segment_tokens < least_tokens:
            raise ConfigError(
                f"data.passkey.min_segments: {self._least} segments of {segment_tokens} tokens can't hold a text of"
                f" {least_tokens} tokens; use {-(-least_tokens // segment_tokens)} or more, and a window of as many"
                " segments"
            )

    def mix(self, position: Progress) -> dict[str, float]:
        """There is one source."""
        return {}

    def start(self) -> Progress:
        """Before the first window."""
        return Progress(0, self._least, START_LOSS)

    def parse(self, tree: Mapping[str, Any]) -> Progress:
        """The position of a `Progress.to_json`."""
        return Progress(int(tree["step"]), float(tree["longest"]), float(tree["loss"]), bool(tree["few_digits"]))

    def learn(self, position: Progress, loss: float) -> Progress:
        """The position when its last window was learned with this loss: keys get harder, then texts grow."""
        config, after = self.config, position.learned(loss)
        if config.few_digits_below_loss is not None and not after.few_digits:
            if after.loss < config.few_digits_below_loss:
                return dataclasses.replace(after, loss=START_LOSS, few_digits=True)
            return after
        return after.grown(self._most) if after.loss < config.grow_below_loss else after

    def name_documents(self, position: Progress) -> list[str]:
        """The number of the step for which all texts of the window behind `position` are made."""
        return [f"texts of step {position.step + 1}"]

    def next(self, position: Progress) -> tuple[Batch, Progress]:
        """The window behind a position, and the position behind the window."""
        shape = (len(self.rows), self.window_tokens)
        window = _Window(
            tokens_BT=np.full(shape, ByteTokenizer.pad_id, np.int64),
            labels_BT=np.full(shape, IGNORED, np.int64),
            starts_BT=np.zeros(shape, bool),
            weights_BT=np.zeros(shape, np.float32),
            loss_weights_BT=np.zeros(shape, np.float32),
        )
        step, n_bytes = position.step, 0
        stage = _Stage(position.few_digits, grown=position.longest >= self._most)
        drawn = self._draw_segments(
            np.random.default_rng([self._seed, step]), position.longest
        )  # the same in all lanes
        for row, lane in enumerate(self.rows):
            random = np.random.default_rng([self._seed, step, 1 + lane])
            first, left = 0, self._most
            while left >= self._least:
                segments = min(drawn, left)
                begin, stop = first * self.segment_tokens, (first + segments) * self.segment_tokens
                n_bytes += self._write_text(window, row, random, slice(begin, stop), stage)
                first, left = first + segments, left - segments
        document_B = np.full(len(self.rows), step, np.int64)
        batch = Batch(**window._asdict(), document_B=document_B, n_bytes=float(n_bytes))
        return batch, dataclasses.replace(position, step=step + 1)

    def _draw_segments(self, random: np.random.Generator, longest: float) -> int:
        """Log-uniform."""
        most = int(longest)
        return min(most, int(math.exp(random.uniform(math.log(self._least), math.log(most + 1)))))

    def _write_text(self, window: _Window, row: int, random: np.random.Generator, place: slice, stage: _Stage) -> int:
        """One text into these columns, from their first one on; returns its bytes."""
        text = self._compose(random, (place.stop - place.start) // self.segment_tokens, stage)
        columns, ids = slice(place.start, place.start + text.tokens), text.ids
        window.starts_BT[row, place.start] = True
        window.tokens_BT[row, columns] = np.concatenate(([ByteTokenizer.bos_id], ids[:-1]))
        window.labels_BT[row, columns] = ids
        window.loss_weights_BT[row, columns] = self._weigh_losses(text)
        window.weights_BT[row, columns] = self._weigh_writes(text, random, stage.grown)
        return text.tokens

    def _compose(self, random: np.random.Generator, segments: int, stage: _Stage) -> Passkey:
        """A text that ends in the last of so many segments; the question may reach back into the one before."""
        size = self.segment_tokens
        worded = self._choose_words(random, segments * size)
        own_tokens = worded.key_tokens + worded.tail_tokens
        kind, inside = random.random(), random.random() < QUESTION_INSIDE or not stage.grown
        beside = kind >= BEFORE_END and own_tokens < size
        least = 1 + (own_tokens if beside else worded.tail_tokens if inside else 0)
        last_tokens = int(random.integers(min(least, size), size + 1))
        length = max((segments - 1) * size + last_tokens, own_tokens)
        writer = self._vary(random, worded, length)
        filler = length - writer.min_tokens
        if beside:
            reach = last_tokens - own_tokens
        else:
            reach = filler if kind < ANYWHERE else size if kind < AT_START else 2 * size
        shift = int(random.integers(0, min(reach, filler) + 1))
        before = shift if kind < AT_START else filler - shift  # anywhere: either way
        return writer.place(self._draw_key(random, stage.few_digits), length, before)

    def _choose_words(self, random: np.random.Generator, most_tokens: int) -> PasskeyWriter:
        """A writer of the wording, or of words drawn for this text alone, if they fit."""
        if not self.config.varied_wording or random.random() < 0.5:
            return self._writer
        drawn = PasskeyWriter(ByteTokenizer(), _draw_wording(random, self._writer.text.filler), self.config.digits)
        return drawn if drawn.key_tokens + drawn.tail_tokens <= most_tokens else self._writer

    def _vary(self, random: np.random.Generator, worded: PasskeyWriter, length: int) -> PasskeyWriter:
        """With filler of this text alone; half of the texts go without an intro, and all that are too short for it."""
        bare = random.random() < 0.5 or length < worded.min_tokens
        writer = worded.without_intro() if bare else worded
        if not self.config.varied_filler:
            return writer
        count = random.integers(SENTENCES_DRAWN[0], SENTENCES_DRAWN[1] + 1)
        sentences = [str(sentence) for sentence in random.choice(SENTENCES, count, replace=False)]
        return writer.refill(
            _draw_nonsense(random) if random.random() < NONSENSE else sentence for sentence in sentences
        )

    def _draw_key(self, random: np.random.Generator, few_digits: bool) -> np.ndarray:
        """Any digits, or some of few: where digits repeat, only their place tells what follows them."""
        if not few_digits:
            return random.integers(0, 10, self.config.digits)
        return random.choice(random.permutation(10)[: random.integers(2, 11)], self.config.digits)

    def _weigh_losses(self, text: Passkey) -> np.ndarray:
        """Every text counts alike, whatever its length; within it, the shares of the config."""
        config, spans = self.config, text.spans
        weights = np.full(text.tokens, config.text_weight / text.tokens, np.float32)
        weights[spans.second_mention] = config.key_weight / config.digits
        # with the space before the digits, so that the model can begin an answer itself
        weights[spans.answer.start - 1 : spans.answer.stop] = config.answer_weight / (config.digits + 1)
        return weights

    def _weigh_writes(self, text: Passkey, random: np.random.Generator, presses: bool) -> np.ndarray:
        config, grid = self.config, (self.window_tokens, self.segment_tokens)
        pressure = config.pressure if presses else 1
        return weigh_writes(random, text.tokens, *grid, [text.spans.key], pressure, config.pressure_share)


def _draw_nonsense(random: np.random.Generator) -> str:
    """Words in any order, so that more neighbours are seen than those of the sentences."""
    return f"{_draw_words(random, *WORDS_DRAWN).capitalize()}."


def _draw_words(random: np.random.Generator, least: int, most: int) -> str:
    return " ".join(map(str, random.choice(WORDS, random.integers(least, most + 1))))


def _draw_wording(random: np.random.Generator, filler: tuple[str, ...]) -> PasskeyText:
    """Other words around key and question, so that digits are remembered whatever is said of them.

    In half of them the question ends in the words that stood before the key, as in the paper's.
    """
    before, after, between = _draw_words(random, 1, 6), _draw_words(random, 0, 3), _draw_words(random, 0, 3)
    key = f"{before} {{key}} {after}".strip().capitalize() + "."
    key = f"{key} {f'{between} {{key}} {_draw_words(random, 0, 5)}'.strip().capitalize()}."
    asked = before if random.random() < 0.5 else _draw_words(random, 1, 6)
    question = f"{_draw_words(random, 3, 7).capitalize()}? {asked.capitalize()}"
    return PasskeyText("drawn", " ".join(_draw_nonsense(random) for _ in range(2)), filler, key, question)
