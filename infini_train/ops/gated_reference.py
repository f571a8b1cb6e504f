"""The gated delta memory one token after the other, float64, never optimised: the judge of gated_delta.py.

Rules beside those of reference.py, whose local attention is used here too:

- A token of write weight w lets the memory fade by a^w, and replaces 1 - (1 - b)^w of what its key finds.
- A document start empties the memory at once.
- `segment`: a token reads what the memory was when its segment began, if its document had begun by then and something
  was written. `token`: it reads what the memory is after the token itself, always.

Shapes: as in reference.py.
"""

from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from infini_train.ops import reference
from infini_train.ops.reference import HeadTokens, Marks

EPS = 1e-6


class GatedInputs(NamedTuple):
    """What a call is given beside its marks."""

    q_BHTD: Tensor
    k_BKTD: Tensor
    v_BKTE: Tensor
    strength_BKT: Tensor  # b
    decay_BKT: Tensor  # a
    beta_H: Tensor
    gate_HD: Tensor | None = None  # what a query adds to its gate
    norm_E: Tensor | None = None  # weights of an RMS norm of what is read


class GatedReferenceMemory(NamedTuple):
    """What a call hands to the next one; see `ReferenceMemory`. `entering` is the memory before the open segment."""

    memory_BKDE: Tensor
    entering_BKDE: Tensor
    written_B: Tensor  # tokens of positive weight in closed segments since the document's start
    recent_k_BKRD: Tensor
    recent_v_BKRE: Tensor
    recent_marks: Marks
    open_tokens: int


class _Head(NamedTuple):
    """The memory of one head in one row after a token, when the token's segment began, and what was written by then."""

    memory_DE: Tensor
    entering_DE: Tensor
    written: Tensor


def unit(x_D: Tensor) -> Tensor:
    """A vector of length one, or nearly zero."""
    return x_D / (x_D @ x_D + EPS).sqrt()


def write(memory_DE: Tensor, k_D: Tensor, v_E: Tensor, strength: Tensor, decay: Tensor, weight: Tensor) -> Tensor:
    """The memory after a token."""
    key_D = unit(k_D)
    memory_DE = memory_DE * decay**weight
    replaced = 1 - (1 - strength) ** weight
    return memory_DE + replaced * torch.outer(key_D, v_E - key_D @ memory_DE)


def empty_memory(inputs: GatedInputs) -> GatedReferenceMemory:
    """The memory before the first token."""
    plain = reference.empty_memory(inputs.k_BKTD, inputs.v_BKTE)
    return GatedReferenceMemory(plain.memory_BKDE, plain.memory_BKDE, plain.written_B, *plain[3:])


def attend(
    inputs: GatedInputs,
    marks: Marks,
    memory: GatedReferenceMemory,
    form: reference.Form,
    read: Literal["segment", "token"],
) -> tuple[Tensor, GatedReferenceMemory]:
    """Attention with a gated delta memory over at least one new token, going on where `memory` ended."""
    (batch, heads), kv_heads = inputs.q_BHTD.shape[:2], inputs.k_BKTD.shape[1]
    k_BKUD = torch.cat([memory.recent_k_BKRD, inputs.k_BKTD], dim=2)
    v_BKUE = torch.cat([memory.recent_v_BKRE, inputs.v_BKTE], dim=2)
    starts_BU = torch.cat([memory.recent_marks.starts_BT, marks.starts_BT], dim=1)
    weights_BU = torch.cat([memory.recent_marks.weights_BT, marks.weights_BT], dim=1)
    recent, length = memory.recent_k_BKRD.shape[2], k_BKUD.shape[2]
    first_edge = recent - memory.open_tokens

    outs, last = {}, {}
    for b, j in product(range(batch), range(kv_heads)):
        tokens = HeadTokens(k_BKUD[b, j], v_BKUE[b, j], starts_BU[b], weights_BU[b])
        head = _Head(memory.memory_BKDE[b, j], memory.entering_BKDE[b, j], memory.written_B[b])
        for t in range(recent, length):
            begin = t - (t - first_edge) % form.segment_tokens
            place = b, j, t - recent
            head = _write_token(head, tokens, t, inputs.strength_BKT[place], inputs.decay_BKT[place])
            for h in range(j * heads // kv_heads, (j + 1) * heads // kv_heads):
                outs[b, h, t] = _attend_token(head, tokens, t, begin, inputs, (b, h, t - recent), form, read)
            if t + 1 == begin + form.segment_tokens:
                head = _close(head, tokens, range(begin, t + 1))
        last[b, j] = head

    open_tokens = (length - first_edge) % form.segment_tokens
    carried = slice(max(length - open_tokens - form.overlap_tokens, 0), length)
    out = torch.stack([outs[key] for key in product(range(batch), range(heads), range(recent, length))])
    parts = [torch.stack(part).unflatten(0, (batch, kv_heads)) for part in zip(*last.values(), strict=True)]
    return out.unflatten(0, (batch, heads, length - recent)), GatedReferenceMemory(
        parts[0],
        parts[1],
        parts[2][:, 0],
        k_BKUD[:, :, carried],
        v_BKUE[:, :, carried],
        Marks(starts_BU[:, carried], weights_BU[:, carried]),
        open_tokens,
    )


def _write_token(head: _Head, tokens: HeadTokens, t: int, strength: Tensor, decay: Tensor) -> _Head:
    """The memory after token t."""
    if tokens.starts_U[t]:
        head = _Head(*(torch.zeros_like(part) for part in head))
    memory_DE = write(head.memory_DE, tokens.k_UD[t], tokens.v_UE[t], strength, decay, tokens.weights_U[t])
    return head._replace(memory_DE=memory_DE)


def _close(head: _Head, tokens: HeadTokens, segment: range) -> _Head:
    """What the next segment may read."""
    begins = [t for t in segment if tokens.starts_U[t]]
    document = range(begins[-1], segment.stop) if begins else segment
    return _Head(head.memory_DE, head.memory_DE, head.written + sum(tokens.weights_U[t] > 0 for t in document))


def _attend_token(  # noqa: PLR0913
    head: _Head,
    tokens: HeadTokens,
    t: int,
    begin: int,
    inputs: GatedInputs,
    place: tuple[int, int, int],
    form: reference.Form,
    read: Literal["segment", "token"],
) -> Tensor:
    """One query of one head, after its token was written: [E]."""
    q_D, h = inputs.q_BHTD[place], place[1]
    local_E = reference.attend_locally(q_D, tokens, t, begin, form)
    is_older = head.written > 0 and not tokens.starts_U[begin : t + 1].any()
    if read == "segment" and not is_older:
        return local_E
    read_E = unit(q_D) @ (head.entering_DE if read == "segment" else head.memory_DE)
    if inputs.norm_E is not None:
        read_E = inputs.norm_E * read_E / ((read_E @ read_E) / len(read_E) + EPS).sqrt()
    beta = inputs.beta_H[h] if inputs.gate_HD is None else inputs.beta_H[h] + inputs.gate_HD[h] @ q_D
    gate = torch.sigmoid(beta)
    return gate * read_E + (1 - gate) * local_E  # eq (10)
