"""Needle texts to train on: the tasks of `infini-train eval needles`, short at first. Imports no torch."""

from collections.abc import Sequence

import numpy as np

from infini_train.config.data import NeedlesConfig, NeedleTask
from infini_train.config.errors import ConfigError, naming
from infini_train.data.synthetic.haystack import HaystackSource, encode_after
from infini_train.data.synthetic.needle_wordings import PASS_KEY, NeedleWording, draw_needle_wording
from infini_train.data.synthetic.needles import THINGS, EncodedNeedles, draw_needles, encode_round
from infini_train.data.synthetic.question_maker import QuestionMaker, join_rounds, require_room
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import Tokenizer

WITH_INTRO = 0.5  # share of the texts that have an intro, if there is room for it
DRAWN_WORDING = 0.5  # share of the texts with words of their own, where wording varies


class NeedleMaker(QuestionMaker):
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

    def __init__(self, config: NeedlesConfig, window_tokens: int, segment_tokens: int, tokenizer: Tokenizer) -> None:
        super().__init__(config, window_tokens, segment_tokens, tokenizer)
        if config.needles > len(THINGS):
            raise ConfigError(f"data.synthetic.needles: {config.needles} are too many; at most {len(THINGS)}")
        self.config = config
        joins = "a number with the full stop after it; needles can't be hidden with it"
        self._stop = encode_after(tokenizer, ".", before="1", joins=joins)
        with naming("data.synthetic.haystack"):
            self._source = HaystackSource(config.haystack, tokenizer)
        self._intro = find_wording("paper").intro
        require_room(self.min_size, segment_tokens, max(self._longest_tokens(), 1))

    def _longest_tokens(self) -> int:
        """Length of the longest text with one needle and no hay, including bos; samples enough to cover every word."""
        config = self.config
        sizes = [
            self._encode(np.random.default_rng(seed), task, 1, config.digits, PASS_KEY, "").min_tokens
            for task in config.tasks
            for seed in range(8 * len(THINGS))
        ]
        return max(sizes) + 1

    def _encode(
        self,
        random: np.random.Generator,
        task: NeedleTask,
        count: int,
        digits: int,
        wording: NeedleWording,
        intro: str,
    ) -> EncodedNeedles:
        return EncodedNeedles(self._tokenizer, draw_needles(random, task, count, digits, wording), intro)

    def _write(self, random: np.random.Generator, segments: int) -> tuple[np.ndarray, np.ndarray, Sequence[slice]]:
        """A text of a random task, with as many of the drawn needles as fit, then as many further questions as fit.

        Returns:
            int32 ids without bos (tokens,); bool (tokens,), True in the answers; where the needles are.
        """
        room = self._room(segments)
        task = self.config.tasks[random.integers(len(self.config.tasks))]
        intro = self._intro if random.random() < WITH_INTRO else ""
        count = int(random.integers(1, self.config.needles + 1))
        digits, wording = self._vary(random)
        encoded = self._encode(random, task, count, digits, wording, intro)
        while encoded.min_tokens > room:
            wording = PASS_KEY if count == 1 else wording  # for which there is room
            count, intro = max(count // 2, 1), ""
            encoded = self._encode(random, task, count, digits, wording, intro)
        further = self._ask_further(random, encoded, room - encoded.min_tokens)
        least = encoded.min_tokens + sum(map(len, further))
        hay = self._draw_hay_tokens(random, segments, least)
        places = np.sort(random.integers(0, hay + 1, len(encoded.needles.sentences)))
        text = encoded.place(self._source.draw(random.integers(0, 2**31, 2).tolist()), places.tolist(), hay)
        ids, answered = join_rounds(text.read(0, text.tokens), text.prompt_tokens, further)
        return ids, answered, text.needle_spans

    def _vary(self, random: np.random.Generator) -> tuple[int, NeedleWording]:
        """Digits and wording of a text."""
        config, wording = self.config, PASS_KEY
        least = config.min_digits
        digits = config.digits if least is None else int(random.integers(least, config.digits + 1))
        if config.varied_wording and random.random() < DRAWN_WORDING:
            wording = draw_needle_wording(random)
        return digits, wording

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
