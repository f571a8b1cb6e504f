"""What a rank sends in one step, by kind of collective.

What crosses tensor- and context-parallel ranks is what the modules themselves exchange when they run on the meta
device (costs.py); pipeline and ZeRO are closed formulas.

A collective over p ranks is counted as its ring: all-gather and reduce-scatter send (p - 1) / p of the whole, an
all-reduce twice that, whatever the library does. tests/plan/test_processes.py compares sizes and numbers with the
calls of real processes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from infini_train.config.parallel import BUCKET_ELEMENTS
from infini_train.config.run import RunConfig
from infini_train.model.caching import NUMBER_BYTES
from infini_train.plan.costs import Costs
from infini_train.plan.parts import Part
from infini_train.plan.states import effective_stage

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "send")


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


def find_collectives(config: RunConfig, costs: Costs, part: Part) -> list[Collective]:
    """One step of one rank, all micro-batches; groups of a single rank are left out."""
    micro_batches = config.lanes_per_rank // config.micro_lanes
    found = [
        *_inside_model(config, costs, part, micro_batches),
        *_pipeline(config, costs, part, micro_batches),
        *_data(config, part, micro_batches),
    ]
    return [each for each in found if each.ranks > 1 and each.calls > 0]


def _inside_model(config: RunConfig, costs: Costs, part: Part, micro_batches: int) -> Iterator[Collective]:
    """What the modules exchange over tensor- and context-parallel ranks."""
    parallel = config.parallel
    groups = {"tensor": (parallel.tensor_size, 1), "context": (parallel.context_size, parallel.tensor_size)}
    pieces = costs.work(part.stages, config.train.activation_checkpointing == "layer")
    for group, (ranks, stride) in groups.items():
        for piece, work in pieces.items():
            for kind in KINDS:
                calls, buffer_bytes = work.exchanges.get((group, kind), (0.0, 0.0))
                yield Collective(
                    name=f"{group}: {piece}",
                    kind=kind,
                    ranks=ranks,
                    stride=stride,
                    calls=micro_batches * calls,
                    buffer_bytes=micro_batches * buffer_bytes,
                )


def _pipeline(config: RunConfig, costs: Costs, part: Part, micro_batches: int) -> list[Collective]:
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
            buffer_bytes=calls * costs.layers[0].input_bytes,
        )
    ]


def _data(config: RunConfig, part: Part, micro_batches: int) -> list[Collective]:
    """Gradients and weights over data- and context-parallel ranks: DeepSpeed's ZeRO."""
    parallel = config.parallel
    ranks, stage = (parallel.data_size or 1) * parallel.context_size, effective_stage(config)
    weight_bytes = NUMBER_BYTES[config.train.precision]
    buckets = max(1, -(-part.parameters // BUCKET_ELEMENTS))
    reductions = micro_batches if stage > 1 else 1  # stages 2 and 3 divide the gradients of each micro-batch
    whole = part.parameters * weight_bytes
    recompute = config.train.activation_checkpointing == "layer"
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
            calls=gathers * (part.layers if stage == 3 else part.groups),
            buffer_bytes=gathers * whole,
            in_micro_batch=stage == 3,
        ),
    ]
