"""What one rank computes for one micro-batch, in closed form: operations, bytes moved, launches, activations kept.

Matrix products and activations are exact. Bytes that all other operations read and write, and their number, are
coefficients counted on the running code; tests/plan/test_work.py holds all four to what a real layer does. The network
does not depend on the values, but the attention's mask does: documents are taken to begin inside the windows, as they
do in text, so that attention computes whole squares under a mask.

Legend: n tokens of a micro-batch that this rank computes, B lanes, D and E key and value sizes, C segments.
"""

from dataclasses import dataclass

from infini_train.config.attention import InfiniConfig, TransformerXLConfig
from infini_train.config.run import RunConfig

FLASH_BACKWARD = 2.5  # five products of the forward's two, since the scores are computed again
SCAN_BLOCK = 64  # segments of one masked product, ops/memory.py


@dataclass(frozen=True)
class Work:
    """Operations of matrix products and of the attention kernel, bytes of all else, and operations started."""

    matmul_flops: float = 0.0
    attention_flops: float = 0.0
    moved_bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.matmul_flops + other.matmul_flops,
            self.attention_flops + other.attention_flops,
            self.moved_bytes + other.moved_bytes,
            self.launches + other.launches,
        )

    def times(self, factor: float) -> "Work":
        """As often, or a share of it."""
        return Work(
            self.matmul_flops * factor,
            self.attention_flops * factor,
            self.moved_bytes * factor,
            self.launches * factor,
        )


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of one rank's part of a layer and of the ends, for one micro-batch. `fused_norm`: as on CUDA."""

    lanes: int
    tokens: int  # of a lane's window on this rank
    stream_tokens: float  # of all lanes, that norms and residuals see (a part under sequence parallelism)
    hidden: int
    heads: int
    kv_heads: int
    key: int
    value: int
    ffn: int
    vocab: int
    segment: int  # tokens; the window without segments
    keys_seen: int  # by a query, under the mask: the segment and its overlap
    conv: int  # tokens before its own that a query or key takes in
    kind: str
    delta: bool
    qk_norm: bool
    activation_bytes: int
    fused_norm: bool

    @property
    def all_tokens(self) -> int:
        """N."""
        return self.lanes * self.tokens

    @property
    def segments(self) -> int:
        """C, of a lane."""
        return self.tokens // self.segment


def find_shapes(config: RunConfig, fused_norm: bool) -> Shapes:
    """The sizes under this config's layout; the same on all ranks."""
    model, parallel, train = config.model, config.parallel, config.train
    tensor = parallel.tensor_size
    tokens = train.window_tokens // parallel.context_size
    segment = model.segment_tokens or tokens
    attention = model.attention
    overlap = attention.cache_tokens if isinstance(attention, TransformerXLConfig) else 0
    overlap = getattr(attention, "overlap_tokens", overlap)
    stream = config.micro_lanes * tokens
    return Shapes(
        lanes=config.micro_lanes,
        tokens=tokens,
        stream_tokens=stream / tensor if parallel.sequence_parallel else stream,
        hidden=model.hidden_size,
        heads=model.num_heads // tensor,
        kv_heads=max(1, model.kv_heads // tensor),
        key=model.key_dim,
        value=model.value_dim,
        ffn=model.ffn_size // tensor,
        vocab=model.vocab_size // tensor,
        segment=segment,
        keys_seen=segment + overlap,
        conv=model.conv_tokens,
        kind=attention.kind,
        delta=isinstance(attention, InfiniConfig) and attention.update == "delta",
        qk_norm=model.qk_norm,
        activation_bytes=2 if train.precision == "bf16" else 4,
        fused_norm=fused_norm,
    )


def layer_work(s: Shapes) -> tuple[Work, Work]:
    """(forward, backward) of one layer; communication aside."""
    n, e = s.all_tokens, s.activation_bytes
    projections = s.hidden * (s.heads * (s.key + s.value) + s.kv_heads * (s.key + s.value) + 3 * s.ffn)
    if s.kind == "transformer_xl":  # keys and values once more, for the next segment
        projections += s.hidden * s.kv_heads * (s.key + s.value)
    products = 2 * n * projections + _memory_flops(s)
    attention = 2 * n * s.heads * s.keys_seen * (s.key + s.value)
    forward_norm, backward_norm = norm_work(s, s.stream_tokens * s.hidden)
    forward_bytes, backward_bytes = _moved_numbers(s)
    forward_launches, backward_launches = _launches(s)
    forward = Work(products, attention, e * forward_bytes, forward_launches) + forward_norm.times(2)
    backward = Work(2 * products, FLASH_BACKWARD * attention, e * backward_bytes, backward_launches)
    backward += backward_norm.times(2)
    if s.qk_norm:
        forward_norm, backward_norm = norm_work(s, n * (s.heads + s.kv_heads) * s.key)
        forward, backward = forward + forward_norm, backward + backward_norm
    return forward, backward


def _memory_flops(s: Shapes) -> float:
    """Write (Eq. 8, 9), scan over the segments, read (Eq. 7)."""
    if s.kind != "infini":
        return 0.0
    n, squares = s.all_tokens, s.kv_heads * s.key * s.value
    states = s.lanes * s.segments * s.kv_heads
    scanned = 2 * s.lanes * sum((size + 1) ** 2 for size in scan_blocks(s.segments))
    normalisers = s.kv_heads * s.key + 1
    read = 2 * n * s.heads * s.key * (s.value + 1)
    if not s.delta:
        return 2 * n * squares + scanned * (squares + normalisers) + read
    transitions = 2 * n * s.kv_heads * s.key * (1 + s.key)
    return 2 * n * squares + scanned * normalisers + transitions + 2 * states * s.key**2 * s.value + read


def scan_blocks(segments: int) -> list[int]:
    """Segments summed by each masked product."""
    return [min(SCAN_BLOCK, segments - first) for first in range(0, segments, SCAN_BLOCK)]


def _moved_numbers(s: Shapes) -> tuple[float, float]:
    """Numbers of activation size that a layer's elementwise operations and small products move, norms aside."""
    n, stream = s.all_tokens, s.stream_tokens * s.hidden
    wide, narrow = n * s.heads * (s.key + s.value) / 2, n * s.kv_heads * (s.key + s.value) / 2
    forward = 6 * stream + 5 * n * s.ffn + 18.5 * wide + 4.8 * narrow
    backward = 10 * stream + 9 * n * s.ffn + 21.5 * wide + 6.0 * narrow
    if s.kind == "infini":
        states = s.lanes * s.segments * s.kv_heads * s.key * s.value * 4 / s.activation_bytes
        forward += 22.5 * wide + 13.5 * narrow + 12 * states
        backward += 46 * wide + 22 * narrow + 19 * states
    if s.delta:
        forward, backward = forward + 20 * narrow, backward + 30 * narrow
    return forward, backward


def _launches(s: Shapes) -> tuple[float, float]:
    """Operations of a layer without its two norms."""
    if s.kind != "infini":
        return 51.0, 43.0
    return (112.0, 98.0) if not s.delta else (116.0 + 5 * s.segments, 117.0 + 5 * s.segments)


def norm_work(s: Shapes, numbers: float) -> tuple[Work, Work]:
    """(forward, backward) of an RMS norm over so many numbers: one kernel on CUDA, many operations in fp32 on CPU."""
    e = s.activation_bytes
    if s.fused_norm:
        return Work(moved_bytes=2 * e * numbers, launches=1), Work(moved_bytes=4 * e * numbers, launches=2)
    casts = 12 if e == 2 else 0
    return (
        Work(moved_bytes=(28.4 + casts) * numbers, launches=6 + casts / 6),
        Work(moved_bytes=(112.6 + casts / 3) * numbers, launches=16 + casts / 4),
    )


def embedding_work(s: Shapes) -> tuple[Work, Work]:
    """(forward, backward); the gradient is as large as the table."""
    e, rows, table = s.activation_bytes, s.all_tokens * s.hidden, s.vocab * s.hidden
    return Work(moved_bytes=3 * e * rows, launches=4), Work(moved_bytes=e * (2 * rows + table), launches=4)


def head_work(s: Shapes) -> tuple[Work, Work]:
    """(forward, backward) of final norm, logits and cross-entropy, whose logits are in fp32."""
    logits, casts = s.all_tokens * s.vocab, 6 if s.activation_bytes == 2 else 0
    forward_norm, backward_norm = norm_work(s, s.stream_tokens * s.hidden)
    products = 2 * logits * s.hidden
    forward = Work(products, 0.0, (4 * 9 + casts) * logits, 40) + forward_norm
    backward = Work(2 * products, 0.0, (4 * 3 + casts) * logits, 25) + backward_norm
    return forward, backward
