"""Passkey texts to train on, in bytes, composed on the fly. Imports no torch.

Keys of few different digits are the harder ones. Texts that have grown to a window may get pressure (`pressure.py`):
segments that don't hold the key are written with larger weights.
"""

import numpy as np

from infini_train.config.data import PasskeyConfig
from infini_train.config.errors import naming
from infini_train.data.synthetic.passkey import Passkey, PasskeyWriter
from infini_train.data.synthetic.pressure import weigh_writes
from infini_train.data.synthetic.question_maker import require_room
from infini_train.data.synthetic.reader import Difficulty, Text
from infini_train.data.synthetic.wordings import SENTENCES, PasskeyText, draw_words, find_wording
from infini_train.data.tokenizer import ByteTokenizer

# Where the key lies, as cumulative shares of the texts: anywhere, in the first segment's worth of filler, in the last
# two segments' worth; in the rest it shares a segment with the question, if both fit.
ANYWHERE, AT_START, BEFORE_END = 0.5, 0.65, 0.85
# Share of the grown texts whose question is not cut by a segment's edge; before they have grown, all. A drawn question
# that is longer than a segment ends at an edge instead.
QUESTION_INSIDE = 0.8
SENTENCES_DRAWN = 2, 8  # sentences of a varied filler
WORDS_DRAWN = 2, 9  # words of a nonsense sentence
NONSENSE = 0.5  # share of nonsense sentences: the real ones are so few that a model memorises them


class PasskeyMaker:
    """Makes texts whose size is their number of segments.

    Args:
        config: wording, lengths, loss weights, pressure.
        window_tokens: the largest text fills it.
        segment_tokens: the model's.

    Raises:
        ConfigError: no such wording, or the smallest size or the window can't hold a text.
    """

    noun = "texts"
    bos_id, pad_id = ByteTokenizer.bos_id, ByteTokenizer.pad_id

    def __init__(self, config: PasskeyConfig, window_tokens: int, segment_tokens: int) -> None:
        self.config, self.window_tokens, self.segment_tokens = config, window_tokens, segment_tokens
        self.max_size = window_tokens // segment_tokens
        self.min_size = min(config.min_segments, self.max_size)
        self.harder_below_loss, self.grow_below_loss = config.few_digits_below_loss, config.grow_below_loss
        with naming("data.synthetic.wording"):
            wording = find_wording(config.wording)
        self._writer = PasskeyWriter(ByteTokenizer(), wording, config.digits)
        require_room(self.min_size, segment_tokens, self._writer.without_intro().min_tokens)

    def compose(
        self, random: np.random.Generator, size: int, room_segments: int, difficulty: Difficulty
    ) -> Text | None:
        """See `TextMaker.compose`; a text ends in the last of its segments."""
        segments = min(size, room_segments)
        if segments < self.min_size:
            return None
        text = self._write(random, segments, difficulty)
        ids = text.ids
        config, grid = self.config, (self.window_tokens, self.segment_tokens)
        pressure = config.pressure if difficulty.grown else 1
        writes = weigh_writes(random, text.tokens, *grid, [text.spans.key], pressure, config.pressure_share)
        return Text(ids, ids, self._weigh_losses(text), writes, segments, text.tokens)

    def _write(self, random: np.random.Generator, segments: int, difficulty: Difficulty) -> Passkey:
        """A text that ends in the last of these segments; the question may start in the one before."""
        size = self.segment_tokens
        worded = self._choose_words(random, segments * size)
        own_tokens = worded.key_tokens + worded.tail_tokens
        kind, inside = random.random(), random.random() < QUESTION_INSIDE or not difficulty.grown
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
        return writer.place(self._draw_key(random, difficulty.harder), length, before)

    def _choose_words(self, random: np.random.Generator, max_tokens: int) -> PasskeyWriter:
        """A writer of the wording, or of words drawn for this text alone, if they fit."""
        if not self.config.varied_wording or random.random() < 0.5:
            return self._writer
        drawn = PasskeyWriter(ByteTokenizer(), _draw_wording(random, self._writer.text.filler), self.config.digits)
        return drawn if drawn.key_tokens + drawn.tail_tokens <= max_tokens else self._writer

    def _vary(self, random: np.random.Generator, worded: PasskeyWriter, length: int) -> PasskeyWriter:
        """With filler for this text alone; half of the texts have no intro, nor have those too short for it."""
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
        """Any digits, or a few repeated ones: where digits repeat, only their place determines the next one."""
        if not few_digits:
            return random.integers(0, 10, self.config.digits)
        return random.choice(random.permutation(10)[: random.integers(2, 11)], self.config.digits)

    def _weigh_losses(self, text: Passkey) -> np.ndarray:
        """Loss weights, float32 (tokens,): every text has the same total, divided as the config says."""
        config, spans = self.config, text.spans
        weights = np.full(text.tokens, config.text_weight / text.tokens, np.float32)
        weights[spans.second_mention] = config.key_weight / config.digits
        # including the space before the digits, so that the model learns to begin an answer
        weights[spans.answer.start - 1 : spans.answer.stop] = config.answer_weight / (config.digits + 1)
        return weights


def _draw_nonsense(random: np.random.Generator) -> str:
    """Words in any order, which show more pairs of neighbours than the sentences do."""
    return f"{draw_words(random, *WORDS_DRAWN).capitalize()}."


def _draw_wording(random: np.random.Generator, filler: tuple[str, ...]) -> PasskeyText:
    """Random words around key and question, so that digits are remembered whatever is said about them.

    Half of the questions end in the words that stood before the key, as in the paper's wording.
    """
    before, after, between = draw_words(random, 1, 6), draw_words(random, 0, 3), draw_words(random, 0, 3)
    key = f"{before} {{key}} {after}".strip().capitalize() + "."
    key = f"{key} {f'{between} {{key}} {draw_words(random, 0, 5)}'.strip().capitalize()}."
    asked = before if random.random() < 0.5 else draw_words(random, 1, 6)
    question = f"{draw_words(random, 3, 7).capitalize()}? {asked.capitalize()}"
    return PasskeyText("drawn", " ".join(_draw_nonsense(random) for _ in range(2)), filler, key, question)
