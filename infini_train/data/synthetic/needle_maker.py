"""Needle texts to train on: the tasks of `infini-train eval needles`, short at first. Imports no torch."""

from collections.abc import Sequence

import numpy as np

from infini_train.config.data import NeedlesConfig, NeedleTask
from infini_train.config.errors import ConfigError, naming
from infini_train.data.lanes import IGNORED
from infini_train.data.synthetic.haystack import HaystackSource, encode_after
from infini_train.data.synthetic.needles import THINGS, EncodedNeedles, draw_needles, encode_round
from infini_train.data.synthetic.pressure import weigh_writes
from infini_train.data.synthetic.reader import Difficulty, Text
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import Tokenizer

WITH_INTRO = 0.5  # share of the texts that have an intro, if there is room for it


class NeedleMaker:
    """Makes texts whose size is their number of segments.

    Args:
        config: tasks, needles, hay, loss weights, pressure.
        window_tokens: the largest text fills it.
        segment_tokens: the model's.
        tokenizer: the model's.

    Raises:
        ConfigError: the haystack can't be read, or a text of one needle does not fit into the smallest size or the
            window.
    """

    noun = "texts"
    harder_below_loss: float | None = None

    def __init__(self, config: NeedlesConfig, window_tokens: int, segment_tokens: int, tokenizer: Tokenizer) -> None:
        if config.needles > len(THINGS):
            raise ConfigError(f"data.synthetic.needles: {config.needles} are too many; at most {len(THINGS)}")
        self.config, self.segment_tokens, self._window_tokens = config, segment_tokens, window_tokens
        self._tokenizer = tokenizer
        self.bos_id, self.pad_id = tokenizer.bos_id, tokenizer.pad_id
        self.grow_below_loss = config.grow_below_loss
        joins = "a number with the full stop after it; needles can't be hidden with it"
        self._stop = encode_after(tokenizer, ".", before="1", joins=joins)
        with naming("data.synthetic.haystack"):
            self._source = HaystackSource(config.haystack, tokenizer)
        self._intro = find_wording("paper").intro
        self.max_size = window_tokens // segment_tokens
        self.min_size = min(config.min_segments, self.max_size)
        needed = max(self._longest_tokens(), 1)
        if self.min_size * segment_tokens < needed:
            raise ConfigError(
                f"data.synthetic.min_segments: {self.min_size} segments of {segment_tokens} tokens can't hold a text of"
                f" {needed} tokens; use {-(-needed // segment_tokens)} or more, and a window of as many segments"
            )

    def _longest_tokens(self) -> int:
        """Length of the longest text with one needle and no hay, including bos; samples enough to cover every word."""
        sizes = [
            self._encode(np.random.default_rng(seed), task, 1, "").min_tokens
            for task in self.config.tasks
            for seed in range(8 * len(THINGS))
        ]
        return max(sizes) + 1

    def _encode(self, random: np.random.Generator, task: NeedleTask, count: int, intro: str) -> EncodedNeedles:
        return EncodedNeedles(self._tokenizer, draw_needles(random, task, count, self.config.digits), intro)

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
        """A text of a random task, with as many of the drawn needles as fit, then as many further questions as fit.

        Returns:
            int32 ids without bos (tokens,); bool (tokens,), True in the answers; where the needles are.
        """
        room = segments * self.segment_tokens - 1  # bos
        task = self.config.tasks[random.integers(len(self.config.tasks))]
        intro = self._intro if random.random() < WITH_INTRO else ""
        count = int(random.integers(1, self.config.needles + 1))
        encoded = self._encode(random, task, count, intro)
        while encoded.min_tokens > room:
            count, intro = max(count // 2, 1), ""
            encoded = self._encode(random, task, count, intro)
        further = self._ask_further(random, encoded, room - encoded.min_tokens)
        least = encoded.min_tokens + sum(map(len, further))
        shortest = max(least, (segments - 1) * self.segment_tokens + 1)
        hay = int(random.integers(shortest, room + 1)) - least
        places = np.sort(random.integers(0, hay + 1, len(encoded.needles.sentences)))
        text = encoded.place(self._source.draw(random.integers(0, 2**31, 2).tolist()), places.tolist(), hay)
        ids = np.concatenate((text.read(0, text.tokens), *further))
        lengths = [text.prompt_tokens, text.answer_tokens, *map(len, further)]  # alternately no answer and an answer
        return ids, np.repeat(np.arange(len(lengths)) % 2 == 1, lengths), text.needle_spans

    def _ask_further(self, random: np.random.Generator, encoded: EncodedNeedles, room: int) -> list[np.ndarray]:
        """Ids to append to the first answer: alternately a further question and its answer, as many as fit."""
        further, found = encoded.needles.further, []
        if self.config.questions == 1:
            return []
        for number in random.permutation(len(further))[: self.config.questions - 1].tolist():
            question, answer = encode_round(self._tokenizer, *further[number])
            room -= len(self._stop) + len(question) + len(answer)
            if room < 0:
                break
            found += [np.concatenate((self._stop, question)), answer]
        return found
