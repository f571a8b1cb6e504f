"""Infini-attention from its equations: one token after the other, float64, never optimised; the fast form's judge.

Equation numbers are those of arXiv 2404.07143. What the paper leaves open and this project decided:

- An empty memory (nothing written since the document's start) is not read, and the gate is not applied.
- A document start drops the memory: the later tokens of its segment read nothing, the segment writes a fresh memory.
- A token of write weight w is written as if it were there w times; 0 (padding) writes nothing.
- Local attention never sees another document; it may also see the last `overlap_tokens` positions before the segment.
- Query heads of one group share the memory of their key-value head; each query head has its own gate.

Shapes: B batch rows, H query heads, K key-value heads (head h uses h // (H / K)), T new tokens, R recent tokens carried
from the call before, U = R + T all tokens at hand, V those that one token sees, D size of queries and keys, E size of
values. Rotary embedding belongs to the local attention alone: queries, keys and the carried keys come without it.
"""

import math
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from infini_train.ops.rope import Rope


class Form(NamedTuple):
    """The kind of Infini-attention; segment and overlap in tokens."""

    segment_tokens: int
    update: Literal["linear", "delta"]  # Eq. 8 or Eq. 9
    overlap_tokens: int = 0  # between 0 and segment_tokens; 0: the paper's form
    rope: Rope = Rope()
    features: Literal["elu", "sharp"] = "elu"  # sigma; the paper's is ELU + 1


class Marks(NamedTuple):
    """What is known of each token: whether a document starts there, and how often it is written."""

    starts_BT: Tensor  # bool
    weights_BT: Tensor  # >= 0


class ReferenceMemory(NamedTuple):
    """What a call hands to the next one.

    Memory and normaliser hold the closed segments, or nothing if a document started in the open one. The recent tokens
    are the `open_tokens` of the segment that is still open (0: none is) and before them up to `overlap_tokens` earlier
    ones, which that segment may look at.
    """

    memory_BKDE: Tensor
    normaliser_BKD: Tensor
    written_B: Tensor  # tokens of positive weight in it since the document's start; 0: the memory is empty
    recent_k_BKRD: Tensor
    recent_v_BKRE: Tensor
    recent_marks: Marks
    open_tokens: int


class HeadMemory(NamedTuple):
    """The memory of one key-value head in one batch row."""

    memory_DE: Tensor
    normaliser_D: Tensor
    written: Tensor


class HeadTokens(NamedTuple):
    """The recent and the new tokens of one key-value head in one batch row."""

    k_UD: Tensor
    v_UE: Tensor
    starts_U: Tensor
    weights_U: Tensor


def sigma(x: Tensor) -> Tensor:
    """ELU + 1, written so that it stays positive far below 0, where elu(x) + 1 rounds to 0."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def sharp(x_D: Tensor) -> Tensor:
    """Not the paper's: relu(x / rms(x))^4 + 0.1, of unit length."""
    feature_D = (x_D / (x_D @ x_D / len(x_D) + 1e-12).sqrt()).clamp(min=0) ** 4 + 0.1
    return feature_D / (feature_D @ feature_D).sqrt()


FEATURES = {"elu": sigma, "sharp": sharp}


def rotate(x_D: Tensor, position: int, rope: Rope) -> Tensor:
    """Rotary position embedding of one vector: the pair (x[i], x[i + D/2]) turned by position times a frequency."""
    angle = position * torch.tensor([frequency(i / len(x_D), rope) for i in range(0, len(x_D), 2)], dtype=x_D.dtype)
    x1, x2 = x_D.chunk(2)
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()])


def frequency(place: float, rope: Rope) -> float:
    """theta^-place; of a wave longer than the original context allows, less (Llama 3.1)."""
    plain = rope.theta**-place
    wave = 2 * math.pi / plain
    if wave < rope.original_tokens / rope.high_freq_factor:
        return plain
    if wave > rope.original_tokens / rope.low_freq_factor:
        return plain / rope.factor
    kept = (rope.original_tokens / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - kept) * plain / rope.factor + kept * plain


def read(q_D: Tensor, past: HeadMemory, form: Form) -> Tensor:
    """What a memory that is not empty answers to a query, or to a key: [E]."""
    feature_D = FEATURES[form.features](q_D)
    return (feature_D @ past.memory_DE) / (feature_D @ past.normaliser_D)  # eq (7)


def forget(past: HeadMemory, tokens: HeadTokens, segment: range) -> tuple[HeadMemory, range]:
    """The memory that a segment adds to and the tokens it adds: none and the last document, if one starts in it."""
    begins = [t for t in segment if tokens.starts_U[t]]
    if not begins:
        return past, segment
    return HeadMemory(*(torch.zeros_like(part) for part in past)), range(begins[-1], segment.stop)


def write(past: HeadMemory, tokens: HeadTokens, segment: range, form: Form) -> HeadMemory:
    """The memory after a segment, given the one before it."""
    past, segment = forget(past, tokens, segment)
    memory_DE, normaliser_D, written = past
    feature_D = {t: FEATURES[form.features](tokens.k_UD[t]) for t in segment}
    repeats = [(tokens.weights_U[t] - 1).clamp_min(0) * feature_D[t] for t in segment]
    last = past._replace(normaliser_D=sum(repeats, normaliser_D))  # before the last of several readings of the segment
    for t in segment:
        k_D, v_E, weight = tokens.k_UD[t], tokens.v_UE[t], tokens.weights_U[t]
        if form.update == "delta" and past.written > 0:
            v_E = v_E - read(k_D, last, form)  # eq (9): every key of the segment reads the memory before the segment
        memory_DE = memory_DE + weight * torch.outer(feature_D[t], v_E)  # eq (8), eq (9)
        normaliser_D = normaliser_D + weight * feature_D[t]  # eq (8)
        written = written + (weight > 0)
    return HeadMemory(memory_DE, normaliser_D, written)


def follow_memory(
    past: HeadMemory, tokens: HeadTokens, segments: list[range], last_is_open: bool, form: Form
) -> list[HeadMemory]:
    """The memory before each segment, and then the one after them all; an open last segment is not written."""
    chain = [past]
    for segment in segments[:-1]:
        chain.append(write(chain[-1], tokens, segment, form))
    if last_is_open:
        return [*chain, forget(chain[-1], tokens, segments[-1])[0]]
    return [*chain, write(chain[-1], tokens, segments[-1], form)]


def attend_locally(q_D: Tensor, tokens: HeadTokens, t: int, begin: int, form: Form) -> Tensor:
    """Softmax attention of token t to its segment, which begins at `begin`, and the overlap before it: [E]."""
    origin = begin - form.overlap_tokens
    visible = [u for u in range(max(origin, 0), t + 1) if not tokens.starts_U[u + 1 : t + 1].any()]
    q_rotated_D = rotate(q_D, t - origin, form.rope)
    k_rotated_VD = torch.stack([rotate(tokens.k_UD[u], u - origin, form.rope) for u in visible])
    return torch.softmax(k_rotated_VD @ q_rotated_D / len(q_D) ** 0.5, dim=0) @ tokens.v_UE[visible]  # eq (2)


def attend_head(
    q_TD: Tensor, tokens: HeadTokens, beta: Tensor, entering: list[HeadMemory], segments: list[range], form: Form
) -> Tensor:
    """One query head over the new tokens of one row; `entering` holds the memory before each segment: [T, E]."""
    recent = len(tokens.k_UD) - len(q_TD)
    gate = torch.sigmoid(beta)
    out = []
    for segment, past in zip(segments, entering, strict=False):
        for t in range(max(segment.start, recent), segment.stop):
            out_E = attend_locally(q_TD[t - recent], tokens, t, segment.start, form)
            if past.written > 0 and not tokens.starts_U[segment.start : t + 1].any():
                out_E = gate * read(q_TD[t - recent], past, form) + (1 - gate) * out_E  # eq (10)
            out.append(out_E)
    return torch.stack(out)


def empty_memory(k_BKTD: Tensor, v_BKTE: Tensor) -> ReferenceMemory:
    """The memory before the first token, for keys and values like these."""
    batch, kv_heads, _, key_size = k_BKTD.shape
    return ReferenceMemory(
        memory_BKDE=k_BKTD.new_zeros(batch, kv_heads, key_size, v_BKTE.shape[3]),
        normaliser_BKD=k_BKTD.new_zeros(batch, kv_heads, key_size),
        written_B=k_BKTD.new_zeros(batch),
        recent_k_BKRD=k_BKTD[:, :, :0],
        recent_v_BKRE=v_BKTE[:, :, :0],
        recent_marks=Marks(torch.zeros(batch, 0, dtype=torch.bool), k_BKTD.new_zeros(batch, 0)),
        open_tokens=0,
    )


def convolve(
    x_BTD: Tensor, weight_JD: Tensor, starts_BT: Tensor, before: list[list[Tensor]] | None = None
) -> tuple[Tensor, list[list[Tensor]]]:
    """Each token and the weighted sum of up to J tokens of its document before it; `before` is what came earlier.

    Returns the output [B, T, D] and, for each row, all tokens so far of the document that is being read.
    """
    rows, histories = [], []
    for b in range(x_BTD.shape[0]):
        history = list(before[b]) if before is not None else []
        out = []
        for x_D, starts in zip(x_BTD[b], starts_BT[b], strict=True):
            history = [] if starts else history
            total_D = x_D
            for weight_D, earlier_D in zip(weight_JD, reversed(history), strict=False):
                total_D = total_D + weight_D * earlier_D
            out.append(total_D)
            history.append(x_D)
        rows.append(torch.stack(out))
        histories.append(history)
    return torch.stack(rows), histories


def attend(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    beta_H: Tensor,
    marks: Marks,
    memory: ReferenceMemory,
    form: Form,
    close: bool = False,
) -> tuple[Tensor, ReferenceMemory]:
    """Infini-attention over at least one new token, going on where `memory` ended.

    A last segment that is shorter than the others stays open and is carried unwritten; with `close` it is written and
    the next call begins a segment. Returns the output [B, H, T, E] and the memory to go on from.
    """
    (batch, heads), kv_heads = q_BHTD.shape[:2], k_BKTD.shape[1]
    k_BKUD = torch.cat([memory.recent_k_BKRD, k_BKTD], dim=2)
    v_BKUE = torch.cat([memory.recent_v_BKRE, v_BKTE], dim=2)
    starts_BU = torch.cat([memory.recent_marks.starts_BT, marks.starts_BT], dim=1)
    weights_BU = torch.cat([memory.recent_marks.weights_BT, marks.weights_BT], dim=1)

    length, first_edge = k_BKUD.shape[2], memory.recent_k_BKRD.shape[2] - memory.open_tokens
    edges = range(first_edge, length, form.segment_tokens)
    segments = [range(edge, min(edge + form.segment_tokens, length)) for edge in edges]
    open_tokens = 0 if close else (length - first_edge) % form.segment_tokens

    tokens: dict[tuple[int, int], HeadTokens] = {}
    chains: dict[tuple[int, int], list[HeadMemory]] = {}
    for b, j in product(range(batch), range(kv_heads)):
        tokens[b, j] = HeadTokens(k_BKUD[b, j], v_BKUE[b, j], starts_BU[b], weights_BU[b])
        past = HeadMemory(memory.memory_BKDE[b, j], memory.normaliser_BKD[b, j], memory.written_B[b])
        chains[b, j] = follow_memory(past, tokens[b, j], segments, open_tokens > 0, form)
    out = []
    for b, h in product(range(batch), range(heads)):
        j = h // (heads // kv_heads)
        out.append(attend_head(q_BHTD[b, h], tokens[b, j], beta_H[h], chains[b, j], segments, form))

    last = [chain[-1] for chain in chains.values()]
    carried = slice(max(length - open_tokens - form.overlap_tokens, 0), length)
    return torch.stack(out).unflatten(0, (batch, heads)), ReferenceMemory(
        memory_BKDE=torch.stack([head.memory_DE for head in last]).unflatten(0, (batch, kv_heads)),
        normaliser_BKD=torch.stack([head.normaliser_D for head in last]).unflatten(0, (batch, kv_heads)),
        written_B=torch.stack([head.written for head in last]).unflatten(0, (batch, kv_heads))[:, 0],
        recent_k_BKRD=k_BKUD[:, :, carried],
        recent_v_BKRE=v_BKUE[:, :, carried],
        recent_marks=Marks(starts_BU[:, carried], weights_BU[:, carried]),
        open_tokens=open_tokens,
    )
