"""What makers of texts with questions at their end share: sizes, loss weights, pressure. Imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from infini_train.config.data import BabilongConfig, NeedlesConfig
from infini_train.config.errors import ConfigError
from infini_train.data.lanes import IGNORED
from infini_train.data.synthetic.pressure import weigh_writes
from infini_train.data.synthetic.reader import Difficulty, Text
from infini_train.data.tokenizer import Tokenizer


class QuestionMaker(ABC):
    """Makes texts whose size is their number of segments.

    Args:
        config: sizes, loss weights, pressure.
        window_tokens: the largest text fills it.
        segment_tokens: the model's.
        tokenizer: the model's.
    """

    noun = "texts"
    harder_below_loss: float | None = None

    def __init__(
        self, config: NeedlesConfig | BabilongConfig, window_tokens: int, segment_tokens: int, tokenizer: Tokenizer
    ) -> None:
        self.segment_tokens, self._window_tokens, self._weights = segment_tokens, window_tokens, config
        self._tokenizer = tokenizer
        self.bos_id, self.pad_id = tokenizer.bos_id, tokenizer.pad_id
        self.grow_below_loss = config.grow_below_loss
        self.max_size = window_tokens // segment_tokens
        self.min_size = min(config.min_segments, self.max_size)

    def compose(
        self, random: np.random.Generator, size: int, room_segments: int, difficulty: Difficulty
    ) -> Text | None:
        """See `TextMaker.compose`; a text ends in the last of its segments."""
        segments = min(size, room_segments)
        if segments < self.min_size:
            return None
        config = self._weights
        ids, answered, kept = self._write(random, segments)
        weights = np.where(answered, config.answer_weight / answered.sum(), config.text_weight / len(ids))
        labels = np.where(weights > 0, ids, IGNORED)
        pressure = config.pressure if difficulty.grown else 1
        grid = (self._window_tokens, self.segment_tokens)
        writes = weigh_writes(random, len(ids), *grid, kept, pressure, config.pressure_share)
        return Text(ids, labels, weights.astype(np.float32), writes, segments, self._count_bytes(ids))

    def _count_bytes(self, ids: np.ndarray) -> int:
        return len(ids) if self._tokenizer.file_name is None else len(self._tokenizer.decode(ids).encode("utf-8"))

    def _room(self, segments: int) -> int:
        """Tokens of a text of so many segments, without bos."""
        return segments * self.segment_tokens - 1

    def _draw_hay_tokens(self, random: np.random.Generator, segments: int, least: int) -> int:
        """Hay beside `least` other tokens, so that the text ends in the last of its segments."""
        shortest = max(least, (segments - 1) * self.segment_tokens + 1)
        return int(random.integers(shortest, self._room(segments) + 1)) - least

    @abstractmethod
    def _write(self, random: np.random.Generator, segments: int) -> tuple[np.ndarray, np.ndarray, Sequence[slice]]:
        """A text that ends in the last of these segments.

        Returns:
            int32 ids without bos (tokens,); bool (tokens,), True in the answers; what pressure spares.
        """


def require_room(min_segments: int, segment_tokens: int, needed: int) -> None:
    """Checks that the shortest texts hold as many tokens, bos among them.

    Raises:
        ConfigError: they don't.
    """
    if min_segments * segment_tokens < needed:
        raise ConfigError(
            f"data.synthetic.min_segments: {min_segments} segments of {segment_tokens} tokens can't hold a text of"
            f" {needed} tokens; use {-(-needed // segment_tokens)} or more, and a window of as many segments"
        )


def join_rounds(text: np.ndarray, prompt_tokens: int, further: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A text up to the end of its answer, then alternately a further question and its answer.

    Returns:
        int32 ids (tokens,); bool (tokens,), True in the answers.
    """
    lengths = [prompt_tokens, len(text) - prompt_tokens, *map(len, further)]  # alternately no answer and an answer
    return np.concatenate((text, *further)), np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
