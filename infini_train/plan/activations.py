"""Bytes that the forward of one micro-batch keeps for its backward, in closed form, and what both need for a moment.

Exact for `infini`, `local` and `full`; tests/plan/test_work.py holds it to the tensors that autograd saves.

Legend: as in work.py.
"""

from infini_train.plan.work import Shapes, scan_blocks

FP32 = 4
IDS = 8  # bytes of a token's id


def layer_input(s: Shapes) -> float:
    """Hidden states between layers; all that activation checkpointing keeps of a layer."""
    return s.stream_tokens * s.hidden * s.activation_bytes


def layer_kept(s: Shapes) -> float:
    """Of one layer without checkpointing, its input included."""
    n, e = s.all_tokens, s.activation_bytes
    kept = 2 * (_norm(s, s.stream_tokens, s.hidden) + e * n * s.hidden)
    if s.qk_norm:
        kept += _norm(s, n * (s.heads + s.kv_heads), s.key)
    kept += _attention(s) + 4 * e * n * s.ffn  # gate, up, silu of gate, product
    return kept + _convolution(s) + (_memory(s) if s.kind == "infini" else 0.0)


def _norm(s: Shapes, rows: float, size: int) -> float:
    """Input and reciprocal root; on CPU in fp32, with the normalised input."""
    return rows * size * s.activation_bytes + FP32 * rows if s.fused_norm else FP32 * rows * (2 * size + 1)


def _attention(s: Shapes) -> float:
    """Rotated queries, keys and values of each query head, the mask, the result twice, a number for each softmax."""
    n, e = s.all_tokens, s.activation_bytes
    windows = s.lanes * s.segments
    keys = windows * s.keys_seen * s.heads * (s.key + s.value)
    queries = n * s.heads * (s.key + 2 * s.value)
    rotary = (s.segment + s.keys_seen) * s.key
    mask = windows * s.segment * s.keys_seen
    return e * (keys + queries + rotary + mask) + FP32 * n * s.heads


def _convolution(s: Shapes) -> float:
    """The tokens with those before, what queries and keys are made of, and the masks."""
    n, lanes, d = s.all_tokens, s.lanes, s.hidden
    return s.activation_bytes * d * (2 * n + s.conv * lanes) + s.conv * (n + lanes) if s.conv else 0.0


def _memory(s: Shapes) -> float:
    """What writing, scanning, reading and the gate keep."""
    n, e, kv = s.all_tokens, s.activation_bytes, s.kv_heads
    windows = s.lanes * s.segments
    written = e * n * kv * (2 * s.key + s.value) + (e * n if e != FP32 else 0)
    scans = FP32 * s.lanes * sum((size + 1) ** 2 for size in scan_blocks(s.segments)) * (1 if s.delta else 2)
    read = e * (n * s.heads * (s.key + s.value + 2) + windows * kv * s.key * (1 + s.value)) + n * s.heads // kv
    gate = e * n * s.heads * (s.value + 1) + n + FP32 * (s.heads + s.lanes)
    return written + scans + read + gate + (_delta(s) if s.delta else 0.0)


def _delta(s: Shapes) -> float:
    """What forgetting keeps: keys and shares in fp32, and the chain's factors."""
    n, kv, windows = s.all_tokens, s.kv_heads, s.lanes * s.segments
    numbers = n * kv * (4 * s.key + 2) + n + windows * (kv * s.key + 1)
    chain = (windows - s.lanes) * kv * s.key * (s.key + s.value)
    return FP32 * (numbers + chain) + windows


def embedding_kept(s: Shapes) -> float:
    """The tokens' ids."""
    return float(IDS * s.all_tokens)


def head_kept(s: Shapes) -> float:
    """Final norm, the logits as probabilities in fp32, labels and weights."""
    n, e = s.all_tokens, s.activation_bytes
    return _norm(s, s.stream_tokens, s.hidden) + e * n * s.hidden + FP32 * n * s.vocab + n * (IDS + 2 + FP32)


def layer_working(s: Shapes) -> float:
    """What backward of a layer needs beside what it has kept, when it needs most: in the feed-forward, or later."""
    n, e = s.all_tokens, s.activation_bytes
    feed_forward = 2 * e * n * s.ffn + 2 * layer_input(s)
    freed = 4 * e * n * s.ffn + _norm(s, s.stream_tokens, s.hidden) + e * n * s.hidden
    attention = 4 * e * n * s.heads * (s.key + s.value) + 2 * layer_input(s)
    return max(feed_forward, attention - freed, 2 * layer_input(s))


def head_working(s: Shapes) -> float:
    """What the ends need beside what they have kept: logits in the precision of training, and gradients."""
    logits = s.activation_bytes * s.all_tokens * s.vocab if s.activation_bytes != FP32 else 0
    return logits + 2 * layer_input(s)
