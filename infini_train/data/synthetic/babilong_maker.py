"""BABILong texts to train on: the tasks of `infini-train eval babilong`, short at first. Imports no torch."""

from collections.abc import Sequence

import numpy as np

from infini_train.config.data import BabilongConfig
from infini_train.config.errors import naming
from infini_train.data.synthetic.babi import Round
from infini_train.data.synthetic.babilong import SentenceHay, count_least_tokens, draw_fitting, spell_round
from infini_train.data.synthetic.needles import encode_round
from infini_train.data.synthetic.question_maker import QuestionMaker, join_rounds, require_room
from infini_train.data.tokenizer import Tokenizer


class BabilongMaker(QuestionMaker):
    """Makes texts whose size is their number of segments.

    Args:
        config: tasks, facts, hay, loss weights, pressure.
        window_tokens: the largest text fills it.
        segment_tokens: the model's.
        tokenizer: the model's.

    Raises:
        ConfigError: the haystack can't be read, or a short story does not fit into the smallest size or the window.
    """

    def __init__(self, config: BabilongConfig, window_tokens: int, segment_tokens: int, tokenizer: Tokenizer) -> None:
        super().__init__(config, window_tokens, segment_tokens, tokenizer)
        self.config = config
        with naming("data.synthetic.haystack"):
            self._sentences = SentenceHay(config.haystack, tokenizer)
        require_room(self.min_size, segment_tokens, count_least_tokens(tokenizer, config.tasks) + 1)  # bos

    def _write(self, random: np.random.Generator, segments: int) -> tuple[np.ndarray, np.ndarray, Sequence[slice]]:
        """A text of a random task with as many facts as fit, then as many further questions as fit.

        Returns:
            int32 ids without bos (tokens,); bool (tokens,), True in the answers; where the facts are.
        """
        room = self._room(segments)
        task = self.config.tasks[random.integers(len(self.config.tasks))]
        encoded = draw_fitting(random, self._tokenizer, task, self.config.max_facts, room)
        further = self._ask_further(encoded.story.rounds[1:], room - encoded.min_tokens)
        least = encoded.min_tokens + sum(map(len, further))
        hay_tokens = self._draw_hay_tokens(random, segments, least)
        hay = self._sentences.draw(random.integers(0, 2**31, 2).tolist())
        text = encoded.place(random, self._sentences, hay, hay_tokens)
        ids, answered = join_rounds(text.read(0, text.tokens), text.prompt_tokens, further)
        return ids, answered, text.needle_spans

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
