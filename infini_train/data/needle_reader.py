"""Needle texts to train on: the tasks of `infini-train eval needles`, short at first. Imports no torch."""

import math

import numpy as np

from infini_train.config.data import NeedlesConfig
from infini_train.config.errors import ConfigError
from infini_train.data.haystack import HaystackSource
from infini_train.data.needles import THINGS, EncodedNeedles, NeedleText, draw_needles, encode_round
from infini_train.data.passkey_wordings import find_wording
from infini_train.data.pressure import weigh_writes
from infini_train.data.text_windows import LaidText
from infini_train.data.tokenizer import Tokenizer

_Round = tuple[np.ndarray, np.ndarray]  # ids of a question and of its answer

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
        self._stop = tokenizer.encode("x.")[len(tokenizer.encode("x")) :]
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
        """Of a text with one needle and no hay, bos included: words differ little in length, so a few are tried."""
        sizes = [
            self._encode(np.random.default_rng(seed), task, 1, "").min_tokens
            for task in self.config.tasks
            for seed in range(2 * len(THINGS))
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
        text, rounds = self._write(random, segments)
        ids = text.read(0, text.tokens)
        answers = np.zeros(text.tokens, bool)
        answers[text.prompt_tokens :] = True
        for question, answer in rounds:
            ids = np.concatenate((ids, self._stop, question, answer))
            answers = np.concatenate(
                (answers, np.zeros(len(self._stop) + len(question), bool), np.ones(len(answer), bool))
            )
        weights = np.where(answers, config.answer_weight / answers.sum(), config.text_weight / len(ids))
        longer = config.pressure * self._window_tokens / len(ids) if grown and config.pressure > 1 else 1
        writes = weigh_writes(random, len(ids), self.segment_tokens, text.needle_spans, longer, config.pressure_share)
        return LaidText(ids, weights.astype(np.float32), writes, segments, self._count_bytes(ids))

    def _count_bytes(self, ids: np.ndarray) -> int:
        return len(self._tokenizer.decode(ids).encode("utf-8"))

    def _write(self, random: np.random.Generator, segments: int) -> tuple[NeedleText, list[_Round]]:
        """Of a drawn task, with as many needles as were drawn and fit; and further questions, as far as they do."""
        room = segments * self.segment_tokens - 1  # bos
        task = self.config.tasks[random.integers(len(self.config.tasks))]
        intro = self._intro if random.random() < WITH_INTRO else ""
        count = int(random.integers(1, self.config.needles + 1))
        encoded = self._encode(random, task, count, intro)
        while encoded.min_tokens > room:
            count, intro = max(count // 2, 1), ""
            encoded = self._encode(random, task, count, intro)
        rounds, least = [], encoded.min_tokens
        for question, answer in encoded.needles.further[: self.config.questions - 1]:
            one = encode_round(self._tokenizer, question, answer)
            if least + len(self._stop) + sum(map(len, one)) <= room:
                rounds.append(one)
                least += len(self._stop) + sum(map(len, one))
        shortest = max(least, (segments - 1) * self.segment_tokens + 1)
        hay = int(random.integers(shortest, room + 1)) - least
        places = np.sort(random.integers(0, hay + 1, len(encoded.needles.sentences)))
        text = encoded.place(self._source.draw(random.integers(0, 2**31, 2).tolist()), places.tolist(), hay)
        return text, rounds
