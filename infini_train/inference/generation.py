"""Generation from a prompt of any length: the prompt is read into the state, then one token after another is chosen.

Legend: B lanes (1), T tokens of a call, D model width, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from infini_train.inference.reading import FORWARD_SEGMENTS, advance, prefill, segment_of
from infini_train.inference.sampling import Sampling
from infini_train.model.transformer import ModelState, Transformer


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    ranked = (logits_V.float().cpu() / sampling.temperature).sort(descending=True, stable=True)
    probability = ranked.values.softmax(0)
    before = probability.cumsum(0) - probability
    keep = before < sampling.top_p
    if sampling.top_k:
        keep[sampling.top_k :] = False
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


def generate(
    model: Transformer, prompt: list[int], *, max_new_tokens: int, stop_id: int | None, sampling: Sampling
) -> Iterator[int]:
    """Yields token ids until `stop_id` (not yielded) or `max_new_tokens`.

    Args:
        model: any variant; memory stays constant with `infini` and `local`.
        prompt: token ids; the first one begins a document.
        max_new_tokens: at most this many.
        stop_id: end of document, or None.
        sampling: how to choose.
    """
    yield from continue_from(model, prompt, None, max_new_tokens=max_new_tokens, stop_id=stop_id, sampling=sampling)


def continue_from(
    model: Transformer,
    prompt: list[int],
    state: ModelState | None,
    *,
    max_new_tokens: int,
    stop_id: int | None,
    sampling: Sampling,
) -> Iterator[int]:
    """`generate` from a state: `prompt` is what follows it; a state of None begins a document."""
    generator = torch.Generator().manual_seed(sampling.seed)
    chunk = FORWARD_SEGMENTS * segment_of(model)
    logits_V, state = feed(model, prompt, state, chunk_tokens=chunk)
    for written in range(1, max_new_tokens + 1):
        token = choose_token(logits_V, sampling, generator)
        if token == stop_id:
            return
        yield token
        if written < max_new_tokens:
            logits_V, state = feed(model, [token], state, chunk_tokens=chunk)
