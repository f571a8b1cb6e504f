"""Prompts of any length read side by side, then an answer that the model writes freely.

The lanes of a batch read whole segments together, as far as the shortest prompt goes; lanes share a row of the batch
for as long as their prompts are the same, so that a common beginning is read once. The rest of each prompt, less than
two segments and seldom as long as another's, is read lane by lane, like a prompt of `infini-train generate`.
Memory holds one forward's tokens and the model's state, whatever the length.

Legend: R rows, T tokens of a forward, V vocabulary.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from infini_train.inference.generation import continue_from
from infini_train.inference.reading import FORWARD_SEGMENTS, prefill, segment_of, take_lane
from infini_train.inference.sampling import Sampling
from infini_train.model.transformer import ModelState, Transformer
from infini_train.parallel import device

GREEDY = Sampling(temperature=0)


class PromptText(Protocol):
    """A text whose end is the answer to its beginning; never spelled out as a whole."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the answer, without bos."""
        ...

    @property
    def answer_tokens(self) -> int:
        """Tokens that the model may write."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """The int32 ids [start, stop)."""
        ...


class PromptAnswers(NamedTuple):
    """What the model wrote after a batch of prompts, and how fast it read them."""

    predicted: list[list[int]]  # token ids, a list a lane
    start_tokens_per_s: float | None  # see `_speeds`; None: too short to measure
    end_tokens_per_s: float | None


@torch.no_grad()
def read_prompts(
    model: Transformer,
    texts: Sequence[PromptText],
    bos_id: int,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> PromptAnswers:
    """Reads the prompts of the texts side by side, and lets the model write as many tokens as each answer has.

    The model reads on from its own tokens, not from the right ones.

    Args:
        model: any variant; memory stays constant where its state does (growth.py).
        texts: a lane each; whatever follows the prompt is not shown.
        bos_id: begins each prompt.
        on_progress: called with the tokens read, of all lanes together; what is read once for several counts for each.
    """
    segment = segment_of(model)
    chunk = FORWARD_SEGMENTS * segment
    lengths = [text.prompt_tokens + 1 for text in texts]
    together = (min(lengths) - 1) // segment * segment  # the last token of every prompt is left for the lanes alone
    forwards: list[tuple[int, float]] = []  # rows, and seconds a token
    state, rows = None, [0] * len(texts)
    for begin in range(0, together, chunk):
        stop, clock = min(begin + chunk, together), time.perf_counter()
        pieces = [_lane(text, bos_id, begin, stop) for text in texts]
        state, rows, tokens_RT = _split_rows(state, rows, pieces)
        state = prefill(model, tokens_RT, state)
        device.synchronise()
        forwards.append((len(tokens_RT), (time.perf_counter() - clock) / tokens_RT.numel()))
        on_progress(len(texts) * (stop - begin))
    predicted = []
    for lane, text in enumerate(texts):
        rest = _lane(text, bos_id, together, lengths[lane]).tolist()
        answer = continue_from(
            model,
            rest,
            take_lane(state, rows[lane]),
            max_new_tokens=text.answer_tokens,
            stop_id=None,
            sampling=GREEDY,
        )
        predicted.append(list(answer))
        on_progress(len(rest))
    return PromptAnswers(predicted, *_speeds(forwards))


def _split_rows(
    state: ModelState | None, rows: list[int], pieces: list[np.ndarray]
) -> tuple[ModelState | None, list[int], Tensor]:
    """A row for each different pair of what a lane has read (its row so far) and what it reads next.

    Returns:
        The state and the tokens of these rows, and the row of each lane.
    """
    numbers: dict[tuple[int, bytes], int] = {}
    after = [numbers.setdefault((row, piece.tobytes()), len(numbers)) for row, piece in zip(rows, pieces, strict=True)]
    first = [after.index(row) for row in range(len(numbers))]  # a lane of each row
    if len(numbers) > max(rows) + 1:  # else they are the same rows: numbers follow the lanes
        before = [rows[lane] for lane in first]
        state = pytree.tree_map_only(Tensor, lambda x_R: x_R[before], state)
    return state, after, torch.from_numpy(np.stack([pieces[lane] for lane in first]))


def _lane(text: PromptText, bos_id: int, start: int, stop: int) -> np.ndarray:
    """int64 tokens [start, stop) of bos and the text."""
    ids = text.read(max(start - 1, 0), stop - 1).astype(np.int64)
    return ids if start else np.concatenate((np.array([bos_id]), ids))


def _speeds(forwards: list[tuple[int, float]]) -> tuple[float, float] | tuple[None, None]:
    """Tokens read a second in the first and in the last tenth of the forwards of the commonest size (medians).

    Those with fewer or more rows are left out, since the size alone changes the speed, and the very first, which warms
    up.
    """
    measured = forwards[1:]
    if not measured:
        return None, None
    size, _ = Counter(rows for rows, _ in measured).most_common(1)[0]
    seconds = [s for rows, s in measured if rows == size]
    tenth = max(len(seconds) // 10, 1)
    return 1 / float(np.median(seconds[:tenth])), 1 / float(np.median(seconds[-tenth:]))
