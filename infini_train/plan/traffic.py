"""What a rank sends in one step, by kind of collective, in closed form.

A collective over p ranks is counted as its ring: all-gather and reduce-scatter send (p - 1) / p of the whole, an
all-reduce twice that, whatever the library does. tests/plan/test_processes.py compares sizes and numbers with the
calls of real processes.

Legend: as in work.py.
"""

import math
from dataclasses import dataclass

from infini_train.config.attention import InfiniConfig
from infini_train.config.run import RunConfig
from infini_train.plan.parts import Part
from infini_train.plan.states import FP32_BYTES, effective_stage
from infini_train.plan.work import Shapes

BUCKET_ELEMENTS = 50_000_000  # of parallel/zero.py, which only DeepSpeed's users may import


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind in one step of one rank.

    Attributes:
        name: what for.
        kind: all-reduce, all-gather, reduce-scatter or send.
        ranks: that take part.
        stride: processes from one of them to the next.
        calls: in a step.
        buffer_bytes: of the whole buffer, all calls together.
        in_micro_batch: whether it belongs to every micro-batch's time, or once to the step.
    """

    name: str
    kind: str
    ranks: int
    stride: int
    calls: float
    buffer_bytes: float
    in_micro_batch: bool = True

    @property
    def sent_bytes(self) -> float:
        """What one rank sends."""
        if self.kind == "send":
            return self.buffer_bytes
        share = (self.ranks - 1) / self.ranks
        return self.buffer_bytes * share * (2 if self.kind == "all-reduce" else 1)

    @property
    def messages(self) -> float:
        """One after the other, along a tree."""
        if self.kind == "send":
            return self.calls
        return self.calls * math.ceil(math.log2(self.ranks)) * (2 if self.kind == "all-reduce" else 1)


def find_collectives(config: RunConfig, shapes: Shapes, part: Part) -> list[Collective]:
    """Of one rank of a pipeline stage, one step, all micro-batches; those with one rank left out."""
    micro_batches = config.lanes_per_rank // config.micro_lanes
    found = [
        *_tensor(config, shapes, part, micro_batches),
        *_context(config, shapes, part, micro_batches),
        *_pipeline(config, shapes, part, micro_batches),
        *_data(config, part, micro_batches),
    ]
    return [each for each in found if each.ranks > 1 and each.calls > 0]


def _tensor(config: RunConfig, s: Shapes, part: Part, micro_batches: int) -> list[Collective]:
    """Entering and leaving attention and feed-forward, embedding, logits, and the cross-entropy's sums."""
    parallel = config.parallel
    ranks = parallel.tensor_size
    recompute = config.train.activation_checkpointing == "layer"
    whole = s.all_tokens * s.hidden * s.activation_bytes
    # of a layer: two sums in forward and two in backward, where a checkpointed layer runs its forward twice
    sums = (4 + 2 * recompute) * part.layers + part.embeds + part.predicts
    sums -= recompute * part.layers  # the last sum of a recomputed layer is nobody's input
    losses = part.predicts * micro_batches
    found = [_sum_over_tensor("tensor: cross-entropy", ranks, 3 * losses, FP32_BYTES * s.all_tokens)]
    if ranks > config.model.kv_heads:  # projections that every rank holds whole
        biased = s.hidden + config.model.qkv_bias
        weights = config.model.kv_heads * (s.key + s.value) * biased * s.activation_bytes
        shared = 2 * part.layers * micro_batches
        found.append(_sum_over_tensor("tensor: shared projections", ranks, shared, weights / 2))
    if not parallel.sequence_parallel:
        return [_sum_over_tensor("tensor: hidden states", ranks, sums * micro_batches, whole), *found]
    # forward: gather and scatter twice; backward: the same the other way round
    gathers = (4 + 2 * recompute) * part.layers + part.embeds + part.predicts
    for kind, calls in (("all-gather", gathers * micro_batches), ("reduce-scatter", sums * micro_batches)):
        found.append(
            Collective(
                name="tensor: hidden states", kind=kind, ranks=ranks, stride=1, calls=calls, buffer_bytes=calls * whole
            )
        )
    norms = (2 * part.layers + part.predicts) * micro_batches
    return [*found, _sum_over_tensor("tensor: gradients of norms", ranks, norms, s.hidden * s.activation_bytes)]


def _sum_over_tensor(name: str, ranks: int, calls: float, call_bytes: float) -> Collective:
    return Collective(name=name, kind="all-reduce", ranks=ranks, stride=1, calls=calls, buffer_bytes=calls * call_bytes)


def _context(config: RunConfig, s: Shapes, part: Part, micro_batches: int) -> list[Collective]:
    """Memories, gathered forward and scattered back (parallel/context.py); the last tokens to the right neighbour."""
    ranks = config.parallel.context_size
    forwards = 2 if config.train.activation_checkpointing == "layer" else 1
    times = part.layers * micro_batches
    stride = config.parallel.tensor_size
    found = []
    if s.kind == "infini":
        numbers = s.kv_heads * (s.key * s.value + s.key + (s.key**2 if s.delta else 0)) + 1
        buffer, each = ranks * s.lanes * FP32_BYTES * numbers, 2 if s.delta else 1
        for kind, passes in (("all-gather", forwards), ("reduce-scatter", 1)):
            calls = each * passes * times
            found.append(
                Collective(
                    name="context: memories",
                    kind=kind,
                    ranks=ranks,
                    stride=stride,
                    calls=calls,
                    buffer_bytes=passes * times * buffer,
                )
            )
    tails = {
        "context: overlap": s.kv_heads * (s.keys_seen - s.segment) * (s.key + s.value),
        "context: convolution": s.conv * s.hidden,
    }
    for name, numbers in tails.items():
        if numbers:
            calls = (2 * forwards + 1) * times  # to the neighbour, from the last one, and back
            tail = s.lanes * numbers * s.activation_bytes
            found.append(
                Collective(name=name, kind="send", ranks=ranks, stride=stride, calls=calls, buffer_bytes=calls * tail)
            )
    return found


def _pipeline(config: RunConfig, s: Shapes, part: Part, micro_batches: int) -> list[Collective]:
    """Hidden states to the next stage, their gradients to the one before."""
    parallel = config.parallel
    edges = 2 * len(part.stages) - part.embeds - part.predicts
    calls = edges * micro_batches
    return [
        Collective(
            name="pipeline: hidden states",
            kind="send",
            ranks=parallel.pipeline_size,
            stride=parallel.tensor_size * parallel.context_size * (parallel.data_size or 1),
            calls=calls,
            buffer_bytes=calls * s.stream_tokens * s.hidden * s.activation_bytes,
        )
    ]


def _data(config: RunConfig, part: Part, micro_batches: int) -> list[Collective]:
    """Gradients and weights over data- and context-parallel ranks: DeepSpeed's ZeRO."""
    parallel = config.parallel
    ranks, stage = (parallel.data_size or 1) * parallel.context_size, effective_stage(config)
    weight_bytes = 2 if config.train.precision == "bf16" else FP32_BYTES
    buckets = max(1, -(-part.parameters // BUCKET_ELEMENTS))
    reductions = micro_batches if stage > 1 else 1  # stages 2 and 3 divide the gradients of each micro-batch
    whole = part.parameters * weight_bytes
    recompute = config.train.activation_checkpointing == "layer"
    groups = 3 if isinstance(config.model.attention, InfiniConfig) else 2  # of AdamW: matrices, vectors, gates
    gathers = micro_batches * (2 + recompute) if stage == 3 else 1
    return [
        Collective(
            name="data: gradients",
            kind="all-reduce" if stage < 3 else "reduce-scatter",
            ranks=ranks,
            stride=parallel.tensor_size,
            calls=reductions * buckets,
            buffer_bytes=reductions * whole,
            in_micro_batch=stage > 1,
        ),
        Collective(
            name="data: weights",
            kind="all-gather",
            ranks=ranks,
            stride=parallel.tensor_size,
            calls=gathers * (part.layers if stage == 3 else groups),
            buffer_bytes=gathers * whole,
            in_micro_batch=stage == 3,
        ),
    ]
