"""The prompts of a needle test, and a model's answers to them."""

from collections.abc import Callable, Collection, Iterator

import numpy as np

from infini_train.config.errors import ConfigError, naming
from infini_train.data.synthetic.haystack import HaystackSource
from infini_train.data.synthetic.needles import ONE_ASKED, TASKS, EncodedNeedles, NeedleText, draw_needles
from infini_train.data.synthetic.passkey import choose_before
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import Tokenizer
from infini_train.eval.needle_scores import NeedleAnswer, NeedleGrid, NeedlePrompt
from infini_train.eval.passkey import EVEN_STEPS
from infini_train.eval.passkey_scores import format_length
from infini_train.eval.streaming import read_prompts
from infini_train.model.transformer import Transformer
from infini_train.parallel import device


class NeedlePrompts:
    """Writes the prompts of a grid.

    Args:
        grid: of the test.
        tokenizer: of the model.
        segment_tokens: of the model; needles and ends are spread over one.

    Raises:
        ConfigError: the haystack can't be read, or a length can't hold its needles.
    """

    def __init__(self, grid: NeedleGrid, tokenizer: Tokenizer, segment_tokens: int) -> None:
        self.grid, self.tokenizer, self.segment_tokens = grid, tokenizer, segment_tokens
        with naming("--haystack"):
            self.source = HaystackSource(grid.haystack, tokenizer)
        self._intro = find_wording("paper").intro
        for prompt in grid.prompts(min(grid.lengths_tokens)):
            needed = self._encode(prompt)[0].min_tokens + 1  # bos
            if needed > prompt.length_tokens:
                length = format_length(prompt.length_tokens)
                raise ConfigError(
                    f"--lengths: {length} can't hold {prompt.needles} needles and their question without any hay, which"
                    f" take up to {needed} tokens; raise it, or lower --needles"
                )

    def _seed(self, prompt: NeedlePrompt) -> list[int]:
        """Of the prompt's cell."""
        grid = self.grid
        task = TASKS.index(grid.task)
        return [grid.seed, task, prompt.length_tokens, prompt.needles, round(prompt.depth * 1e9), grid.digits]

    def _encode(self, prompt: NeedlePrompt) -> tuple[EncodedNeedles, np.random.Generator]:
        random = np.random.default_rng([*self._seed(prompt), prompt.sample])
        needles = draw_needles(random, self.grid.task, prompt.needles, self.grid.digits)
        return EncodedNeedles(self.tokenizer, needles, self._intro), random

    def write(self, prompt: NeedlePrompt) -> NeedleText:
        """The text of a prompt.

        The asked needle of a cell and the end of the text take their phases against the segment grid from an evenly
        filling sequence; all other needles lie anywhere. The text is up to a segment shorter than the prompt's length.
        """
        encoded, random = self._encode(prompt)
        shares = np.random.default_rng(self._seed(prompt)).random(2)
        needle_share, end_share = (shares + prompt.sample * EVEN_STEPS) % 1
        longest = prompt.length_tokens - 1
        tokens = longest - int(end_share * min(self.segment_tokens, longest - encoded.min_tokens + 1))
        hay = tokens - encoded.min_tokens
        before = random.integers(0, hay + 1, prompt.needles * (2 if self.grid.task == "variables" else 1))
        if self.grid.task in ONE_ASKED:
            (asked,) = encoded.needles.asked
            before[asked] = choose_before(hay, prompt.depth, self.segment_tokens, needle_share)
            encoded, before = self._reorder(encoded, before)
        source = self.source.draw([*self._seed(prompt), prompt.sample, 1])
        return encoded.place(source, [int(place) for place in np.sort(before)], hay)

    def _reorder(self, encoded: EncodedNeedles, before: np.ndarray) -> tuple[EncodedNeedles, np.ndarray]:
        """Sentences in the order of their places, so that the asked one keeps its own."""
        needles, order = encoded.needles, np.argsort(before, kind="stable")
        asked = tuple(int(np.flatnonzero(order == number)[0]) for number in needles.asked)
        needles = needles._replace(sentences=tuple(needles.sentences[i] for i in order), asked=asked)
        return EncodedNeedles(self.tokenizer, needles, self._intro), before[order]


def answer_needles(
    model: Transformer,
    prompts: NeedlePrompts,
    *,
    lanes: int,
    done: Collection[NeedlePrompt] = (),
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> Iterator[list[NeedleAnswer]]:
    """Answers to the prompts of a grid, a batch at a time, shorter lengths first.

    The model may write as many tokens as the right answer has.

    Args:
        model: any variant, on its device.
        prompts: of the grid.
        lanes: prompts of one length read side by side.
        done: prompts to leave out.
        on_progress: called with tokens read.
    """
    tokenizer = prompts.tokenizer
    for length in sorted(prompts.grid.lengths_tokens):
        missing = [prompt for prompt in prompts.grid.prompts(length) if prompt not in done]
        for batch in (missing[first : first + lanes] for first in range(0, len(missing), lanes)):
            texts = [prompts.write(prompt) for prompt in batch]
            reading = read_prompts(model, texts, tokenizer.bos_id, on_progress)
            yield [
                NeedleAnswer(
                    **prompt._asdict(),
                    tokens=text.prompt_tokens + 1,
                    needle_tokens=[text.needle_spans[i].start + 1 for i in text.needles.asked],
                    question_token=text.question_token + 1,
                    expected=list(text.needles.answer),
                    said=tokenizer.decode(said),
                    start_tokens_per_s=reading.start_tokens_per_s,
                    end_tokens_per_s=reading.end_tokens_per_s,
                    lanes=len(batch),
                    peak_memory_bytes=device.peak_memory_bytes(),
                )
                for prompt, text, said in zip(batch, texts, reading.said, strict=True)
            ]
