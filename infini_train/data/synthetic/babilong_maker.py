"""BABILong texts to train on: the tasks of `infini-train eval babilong`, short at first. Imports no torch."""

from collections.abc import Sequence

import numpy as np

from infini_train.config.data import BabilongConfig
from infini_train.config.errors import ConfigError, naming
from infini_train.data.lanes import IGNORED
from infini_train.data.synthetic.babi import Round
from infini_train.data.synthetic.babilong import SentenceHay, count_least_tokens, draw_fitting, spell_round
from infini_train.data.synthetic.needles import encode_round
from infini_train.data.synthetic.pressure import weigh_writes
from infini_train.data.synthetic.reader import Difficulty, Text
from infini_train.data.tokenizer import Tokenizer


class BabilongMaker:
    """Makes texts whose size is their number of segments.

    Args:
        config: tasks, facts, hay, loss weights, pressure.
        window_tokens: the largest text fills it.
        segment_tokens: the model's.
        tokenizer: the model's.

    Raises:
        ConfigError: the haystack can't be read, or a short story does not fit into the smallest size or the window.
    """

    noun = "texts"
    harder_below_loss: float | None = None

    def __init__(self, config: BabilongConfig, window_tokens: int, segment_tokens: int, tokenizer: Tokenizer) -> None:
        self.config, self.segment_tokens, self._window_tokens = config, segment_tokens, window_tokens
        self._tokenizer = tokenizer
        self.bos_id, self.pad_id = tokenizer.bos_id, tokenizer.pad_id
        self.grow_below_loss = config.grow_below_loss
        with naming("data.synthetic.haystack"):
            self._sentences = SentenceHay(config.haystack, tokenizer)
        self.max_size = window_tokens // segment_tokens
        self.min_size = min(config.min_segments, self.max_size)
        needed = count_least_tokens(tokenizer, config.tasks) + 1  # bos
        if self.min_size * segment_tokens < needed:
            raise ConfigError(
                f"data.synthetic.min_segments: {self.min_size} segments of {segment_tokens} tokens can't hold a text of"
                f" {needed} tokens; use {-(-needed // segment_tokens)} or more, and a window of as many segments"
            )

    def compose(
        self, random: np.random.Generator, size: int, room_segments: int, difficulty: Difficulty
    ) -> Text | None:
        """See `TextMaker.compose`; a text ends in the last of its segments."""
        segments = min(size, room_segments)
        if segments < self.min_size:
            return None
        config = self.config
        ids, answered, kept = self._write(random, segments)
        weights = np.where(answered, config.answer_weight / answered.sum(), config.text_weight / len(ids))
        labels = np.where(weights > 0, ids, IGNORED)
        pressure = config.pressure if difficulty.grown else 1
        grid = (self._window_tokens, self.segment_tokens)
        writes = weigh_writes(random, len(ids), *grid, kept, pressure, config.pressure_share)
        return Text(ids, labels, weights.astype(np.float32), writes, segments, self._count_bytes(ids))

    def _count_bytes(self, ids: np.ndarray) -> int:
        return len(ids) if self._tokenizer.file_name is None else len(self._tokenizer.decode(ids).encode("utf-8"))

    def _write(self, random: np.random.Generator, segments: int) -> tuple[np.ndarray, np.ndarray, Sequence[slice]]:
        """A text of a random task with as many facts as fit, then as many further questions as fit.

        Returns:
            int32 ids without bos (tokens,); bool (tokens,), True in the answers; where the facts are.
        """
        room = segments * self.segment_tokens - 1  # bos
        task = self.config.tasks[random.integers(len(self.config.tasks))]
        encoded = draw_fitting(random, self._tokenizer, task, self.config.max_facts, room)
        further = self._ask_further(encoded.story.rounds[1:], room - encoded.min_tokens)
        least = encoded.min_tokens + sum(map(len, further))
        shortest = max(least, (segments - 1) * self.segment_tokens + 1)
        hay_tokens = int(random.integers(shortest, room + 1)) - least
        hay = self._sentences.draw(random.integers(0, 2**31, 2).tolist())
        text = encoded.place(random, self._sentences, hay, hay_tokens)
        ids = np.concatenate((text.read(0, text.tokens), *further))
        lengths = [text.prompt_tokens, text.answer_tokens, *map(len, further)]  # alternately no answer and an answer
        return ids, np.repeat(np.arange(len(lengths)) % 2 == 1, lengths), text.needle_spans

    def _ask_further(self, rounds: Sequence[Round], room: int) -> list[np.ndarray]:
        """Ids to append to the first answer: alternately a further question and its answer, as many as fit."""
        found: list[np.ndarray] = []
        for asked in rounds[: self.config.questions - 1]:
            encoded = encode_round(self._tokenizer, *spell_round(asked))
            room -= sum(map(len, encoded))
            if room < 0:
                break
            found += encoded
        return found
