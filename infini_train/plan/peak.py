"""The most memory that a rank holds: states, activations, logits, buffers, in closed form.

There are two moments to look at: the backward of the first micro-batch, when as many are in flight as the pipeline's
schedule asks for, and the optimizer's step, when activations are gone but gradients are laid out anew.
"""

from dataclasses import dataclass

from infini_train.config.run import RunConfig
from infini_train.plan import activations
from infini_train.plan.parts import Part
from infini_train.plan.states import FP32_BYTES, StateBytes, effective_stage
from infini_train.plan.traffic import BUCKET_ELEMENTS
from infini_train.plan.work import Shapes


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """Bytes in a device's memory at its fullest.

    Attributes:
        states: weights, gradients, masters, moments.
        carried: memories before and after the window.
        activations: kept for backward by all micro-batches in flight.
        logits: in fp32, of the last stage, and what the loss needs for them.
        working: what the layer at work needs beside what is kept.
        buffers: of collectives: DeepSpeed's buckets, gathered hidden states, memories of other ranks.
        step: what the optimizer's step needs beside the states.
        peak: the larger of the two moments.
    """

    states: float
    carried: float
    activations: float
    logits: float
    working: float
    buffers: float
    step: float
    peak: float


def in_flight(config: RunConfig, stage: int) -> int:
    """Micro-batches whose activations a pipeline rank keeps at once, counted in visits to one of its stages."""
    parallel = config.parallel
    micro_batches = config.lanes_per_rank // config.micro_lanes
    ranks, virtual = parallel.pipeline_size, parallel.virtual_stages
    if virtual == 1:
        return min(micro_batches, ranks - stage)
    warm_up = 2 * (ranks - stage - 1) + (virtual - 1) * ranks
    return min(micro_batches * virtual, warm_up + 1)


def find_peak(config: RunConfig, s: Shapes, part: Part, states: StateBytes, carried: float) -> PeakBytes:
    """Of a rank of this part. `states` and `carried` as counted, or from the part itself."""
    visits = in_flight(config, part.pipeline_rank)
    layers = part.layers / len(part.stages)
    recompute = config.train.activation_checkpointing == "layer"
    layer = activations.layer_input(s) if recompute else activations.layer_kept(s)
    kept = visits * layers * layer
    if part.embeds:
        kept += -(-visits // len(part.stages)) * activations.embedding_kept(s)
    logits = 0.0
    if part.predicts:
        logits = activations.head_kept(s)
    layer_work = activations.layer_working(s) + (activations.layer_kept(s) if recompute else 0.0)
    head_work = activations.head_working(s) if part.predicts else 0.0
    head_peak = logits + head_work
    moment = max(head_peak, layer_work)  # once a layer is at work, the logits are gone
    buffers = _buffers(config, s, part)
    step = step_bytes(config, part)
    training = states.total + 2 * carried + kept + moment + buffers
    stepping = states.total + 2 * carried + step
    return PeakBytes(
        states=states.total,
        carried=2 * carried,
        activations=kept,
        logits=head_peak,
        working=layer_work,
        buffers=buffers,
        step=step,
        peak=max(training, stepping),
    )


def step_bytes(config: RunConfig, part: Part) -> float:
    """Of the optimizer's step beyond the states: buckets of ZeRO 1, then flat gradients and AdamW's denominators.

    When AdamW begins, the gradients that were added up are gone: they lie in its flat ones.
    """
    if config.parallel.offload_optimizer:
        return 0.0
    stage, low_precision = effective_stage(config), config.train.precision == "bf16"
    adamw = FP32_BYTES * 2.0 * part.largest_group
    if stage > 1:
        return adamw + (0 if low_precision or stage == 3 else FP32_BYTES * part.largest_group)
    bucket = FP32_BYTES * min(BUCKET_ELEMENTS, part.parameters)
    others = FP32_BYTES * (part.parameters - part.partition)  # gradients that other ranks' states need
    return max(float(bucket), adamw - others)


def _buffers(config: RunConfig, s: Shapes, part: Part) -> float:
    """At work during backward: a gradient that was just computed, buckets where each backward reduces, and copies."""
    parallel = config.parallel
    weight_bytes = 2 if config.train.precision == "bf16" else FP32_BYTES
    buffers = float(part.largest_parameter * weight_bytes)
    if effective_stage(config) == 2:  # the bucket, and its flat copy on the way
        buffers += 2.0 * min(BUCKET_ELEMENTS, part.parameters) * weight_bytes
    if effective_stage(config) == 3:  # the weights of a layer, gathered, and a bucket
        buffers += (part.largest_parameter + min(BUCKET_ELEMENTS, part.parameters)) * weight_bytes
    if parallel.sequence_parallel:
        buffers += s.all_tokens * s.hidden * s.activation_bytes
    if parallel.context_size > 1 and s.kind == "infini":
        square = s.kv_heads * s.key * (s.value + 1 + (s.key if s.delta else 0))
        buffers += 2 * parallel.context_size * s.lanes * FP32_BYTES * square
    return buffers
