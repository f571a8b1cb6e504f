"""Generation from a prompt of any length: the prompt is read into the state, then one token after another is chosen.

Legend: B lanes (1), T tokens of a call, D model width, V vocabulary.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from infini_train.config.errors import ConfigError
from infini_train.inference.reading import FORWARD_SEGMENTS, advance, prefill, segment_of
from infini_train.inference.sampling import Sampling
from infini_train.model.transformer import ModelState, Transformer

StopId = int | Collection[int] | None


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id.

    Raises:
        ConfigError: the model gives no numbers, since weights are damaged or training has diverged.
    """
    if not logits_V.isfinite().all():
        raise ConfigError("the model's output is NaN or infinity: its weights are damaged; take an earlier checkpoint")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.float().cpu() / sampling.temperature
    if not scaled_V.isfinite().all():  # so near 0 that they overflow
        scaled_V = (logits_V.double() - logits_V.max()).cpu() / sampling.temperature
    ranked = scaled_V.sort(descending=True, stable=True)
    probability = ranked.values.softmax(0)
    before = probability.cumsum(0) - probability
    keep = before < sampling.top_p
    if 0 < sampling.top_k < len(keep):
        keep[sampling.top_k :] = False
    keep[0] = True  # however small top_p is
    choice = torch.multinomial(probability * keep, 1, generator=generator)
    return int(ranked.indices[choice])


@torch.no_grad()
def feed(
    model: Transformer, tokens: list[int], state: ModelState | None, *, chunk_tokens: int
) -> tuple[Tensor, ModelState]:
    """Reads tokens in chunks; returns logits_V after the last one, and the state.

    Args:
        model: any variant.
        tokens: at least one.
        state: what was read before; None: the tokens begin a document.
        chunk_tokens: tokens a forward; memory use depends on it, the result does not.
    """
    assert tokens
    *before, last = (tokens[begin : begin + chunk_tokens] for begin in range(0, len(tokens), chunk_tokens))
    for chunk in before:
        state = prefill(model, torch.tensor([chunk]), state)
    hidden_TBD, state = advance(model, torch.tensor([last]), state)
    return model.logits(hidden_TBD[-1:])[0, 0], state


def continue_from(
    model: Transformer,
    prompt: list[int],
    state: ModelState | None,
    *,
    max_new_tokens: int,
    stop_id: StopId,
    sampling: Sampling,
) -> Iterator[int]:
    """Yields token ids until one that ends the text (not yielded), or `max_new_tokens`.

    Args:
        model: any variant; memory stays constant where its state does (growth.py).
        prompt: token ids that follow what was read before.
        state: what was read before; None: the first of them begins a document.
        max_new_tokens: at most this many.
        stop_id: the id that ends a text, several of them, or None.
        sampling: how to choose.

    Raises:
        ConfigError: the weights are damaged.
    """
    yield from Conversation(model, state).reply(
        prompt, max_new_tokens=max_new_tokens, stop_id=stop_id, sampling=sampling
    )


class Conversation:
    """A text that a user and the model write by turns; what was said is kept in the state.

    Args:
        model: any variant.
        state: what was read before; None: nothing, the first token begins a document.
        tokens: how many tokens that were.
    """

    def __init__(self, model: Transformer, state: ModelState | None = None, tokens: int = 0) -> None:
        self.model = model
        self.chunk_tokens = FORWARD_SEGMENTS * segment_of(model)
        self._state, self._tokens = state, tokens
        self._unread: list[int] = []  # the last token written: no next one was asked for yet

    def reply(self, said: list[int], *, max_new_tokens: int, stop_id: StopId, sampling: Sampling) -> Iterator[int]:
        """Reads what is said, and yields the answer as `continue_from` does; 0 new tokens are none, and all is read."""
        stops = {stop_id} if isinstance(stop_id, int) else set(stop_id or ())
        generator = torch.Generator().manual_seed(sampling.seed)
        self._unread += said
        for _ in range(max_new_tokens):
            logits_V = self._read()
            token = choose_token(logits_V, sampling, generator)
            if token in stops:
                return
            self._unread.append(token)
            yield token

    def remember(self) -> tuple[ModelState, int]:
        """The state after all that was said and written, and the tokens of it."""
        if self._unread:
            self._read()
        assert self._state is not None
        return self._state, self._tokens

    def _read(self) -> Tensor:
        logits_V, self._state = feed(self.model, self._unread, self._state, chunk_tokens=self.chunk_tokens)
        self._tokens += len(self._unread)
        self._unread = []
        return logits_V
