"""Needle texts to train on: the tasks of `infini-train eval needles`, short at first. Imports no torch."""

import math
from collections.abc import Sequence

import numpy as np

from infini_train.config.data import NeedlesConfig
from infini_train.config.errors import ConfigError
from infini_train.data.haystack import HaystackSource, encode_behind
from infini_train.data.needles import THINGS, EncodedNeedles, draw_needles, encode_round
from infini_train.data.passkey_wordings import find_wording
from infini_train.data.pressure import weigh_writes
from infini_train.data.text_windows import LaidText
from infini_train.data.tokenizer import Tokenizer

WITH_INTRO = 0.5  # of the texts that have room for it


class NeedleMaker:
    """Texts whose size is a number of segments.

    Args:
        config: tasks, needles, hay, weights of the losses.
        window_tokens: the largest text fills it.
        segment_tokens: of the model.
        tokenizer: of the model.

    Raises:
        ConfigError: a text of one needle does not fit into the smallest size or the window.
    """

    def __init__(self, config: NeedlesConfig, window_tokens: int, segment_tokens: int, tokenizer: Tokenizer) -> None:
        if config.needles > len(THINGS):
            raise ConfigError(f"data.needles.needles: {config.needles} are too many; at most {len(THINGS)}")
        self.config, self.segment_tokens, self._window_tokens = config, segment_tokens, window_tokens
        self._tokenizer = tokenizer
        self.bos_id, self.pad_id = tokenizer.bos_id, tokenizer.pad_id
        joins = "a number with the full stop behind it; needles can't be hidden with it"
        self._stop = encode_behind(tokenizer, ".", before="1", joins=joins)
        self._source = HaystackSource(config.haystack, self._tokenizer)
        self._intro = find_wording("paper").intro
        self.most = float(window_tokens // segment_tokens)
        self.least = float(min(config.min_segments, int(self.most)))
        needed = max(self._longest_tokens(), 1)
        if self.least * segment_tokens < needed:
            raise ConfigError(
                f"data.needles.min_segments: {int(self.least)} segments of {segment_tokens} tokens can't hold a text of"
                f" {needed} tokens; use {-(-needed // segment_tokens)} or more, and a window of as many segments"
            )

    def _longest_tokens(self) -> int:
        """Of a text with one needle and no hay, bos included: so many are drawn that all things come."""
        sizes = [
            self._encode(np.random.default_rng(seed), task, 1, "").min_tokens
            for task in self.config.tasks
            for seed in range(8 * len(THINGS))
        ]
        return max(sizes) + 1

    def _encode(self, random: np.random.Generator, task: str, count: int, intro: str) -> EncodedNeedles:
        return EncodedNeedles(self._tokenizer, draw_needles(random, task, count, self.config.digits), intro)  # type: ignore[arg-type]

    def draw_size(self, random: np.random.Generator, largest: float) -> int:
        """Log-uniform."""
        low, high = math.log(self.least), math.log(int(largest) + 1)
        return min(int(largest), int(math.exp(random.uniform(low, high))))

    def compose(self, random: np.random.Generator, size: int, room_segments: int, grown: bool) -> LaidText | None:
        """A text that ends in the last of so many segments, or of those that are left; under pressure once grown."""
        segments = min(size, room_segments)
        if segments < self.least:
            return None
        config = self.config
        ids, answered, kept = self._write(random, segments)
        weights = np.where(answered, config.answer_weight / answered.sum(), config.text_weight / len(ids))
        pressure = config.pressure if grown else 1
        grid = (self._window_tokens, self.segment_tokens)
        writes = weigh_writes(random, len(ids), *grid, kept, pressure, config.pressure_share)
        return LaidText(ids, weights.astype(np.float32), writes, segments, self._count_bytes(ids))

    def _count_bytes(self, ids: np.ndarray) -> int:
        return len(ids) if self._tokenizer.file_name is None else len(self._tokenizer.decode(ids).encode("utf-8"))

    def _write(self, random: np.random.Generator, segments: int) -> tuple[np.ndarray, np.ndarray, Sequence[slice]]:
        """Of a drawn task, with as many needles as were drawn and fit; and further questions, as far as they do.

        Returns:
            int32 ids without bos, which of them are of an answer, and where the needles are.
        """
        room = segments * self.segment_tokens - 1  # bos
        task = self.config.tasks[random.integers(len(self.config.tasks))]
        intro = self._intro if random.random() < WITH_INTRO else ""
        count = int(random.integers(1, self.config.needles + 1))
        encoded = self._encode(random, task, count, intro)
        while encoded.min_tokens > room:
            count, intro = max(count // 2, 1), ""
            encoded = self._encode(random, task, count, intro)
        behind = self._ask_further(random, encoded, room - encoded.min_tokens)
        least = encoded.min_tokens + sum(map(len, behind))
        shortest = max(least, (segments - 1) * self.segment_tokens + 1)
        hay = int(random.integers(shortest, room + 1)) - least
        places = np.sort(random.integers(0, hay + 1, len(encoded.needles.sentences)))
        text = encoded.place(self._source.draw(random.integers(0, 2**31, 2).tolist()), places.tolist(), hay)
        ids = np.concatenate((text.read(0, text.tokens), *behind))
        parts = [text.prompt_tokens, text.answer_tokens, *map(len, behind)]  # by turns no answer and one
        return ids, np.repeat(np.arange(len(parts)) % 2 == 1, parts), text.needle_spans

    def _ask_further(self, random: np.random.Generator, encoded: EncodedNeedles, room: int) -> list[np.ndarray]:
        """Ids of further questions and answers by turns, behind the first answer, as many as fit."""
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
