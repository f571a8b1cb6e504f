"""The most memory that a rank holds: states, activations, logits, buffers.

Three moments count: the beginning of a backward, when as many micro-batches are in flight as the pipeline's
schedule asks for; its end, when a layer's activations are left, but DeepSpeed's bucket is full; and the optimizer's
step, when activations are gone but gradients are laid out anew.
"""

from dataclasses import dataclass

from infini_train.config.parallel import BUCKET_ELEMENTS
from infini_train.config.run import RunConfig
from infini_train.model.caching import NUMBER_BYTES
from infini_train.plan.costs import Costs
from infini_train.plan.parts import Part
from infini_train.plan.states import FP32_BYTES, StateBytes, effective_stage

LIVE_ELEMENTS = 1_000_000_000  # of gathered weights that DeepSpeed's stage 3 keeps: stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """Bytes in a device's memory at its fullest.

    Attributes:
        states: weights, gradients, masters, moments.
        carried: memories before and after the window.
        activations: kept for backward by all micro-batches in flight.
        logits: what head and loss need, of the last stage.
        working: what the layer at work needs beside what is kept, exchanges with other ranks included.
        buffers: weights gathered under ZeRO 3, and a gradient just computed.
        buckets: of gradients, when a backward ends.
        step: what the optimizer's step needs beside the states.
        peak: the largest of the three moments.
    """

    states: float
    carried: float
    activations: float
    logits: float
    working: float
    buffers: float
    buckets: float
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


def find_peak(config: RunConfig, costs: Costs, part: Part, states: StateBytes, carried: float) -> PeakBytes:
    """The peak of a rank of this part. `states` and `carried` as counted, or from the part itself."""
    visits = in_flight(config, part.pipeline_rank)
    recompute = config.train.activation_checkpointing == "layer"
    layers = costs.of_layers(part.stages)
    of_layers = sum(count * (cost.input_bytes if recompute else cost.kept_bytes) for cost, count in layers)
    kept = visits * (of_layers / len(part.stages) + costs.stack.kept_bytes)
    if part.embeds:
        kept += -(-visits // len(part.stages)) * costs.embedding.kept_bytes
    working = max(cost.working_bytes + (cost.kept_bytes if recompute else 0.0) for cost, _ in layers)
    last = max(cost.working_bytes + cost.kept_bytes + (cost.input_bytes if recompute else 0.0) for cost, _ in layers)
    logits = costs.head.kept_bytes + costs.head.working_bytes if part.predicts else 0.0
    moment = max(logits, working)  # once a layer is at work, the logits are gone
    buffers, (early, buckets) = _buffers(config, part), _buckets(config, part, costs.on_cuda)
    step = step_bytes(config, part)
    lasting = states.total + 2 * carried
    summed = config.lanes_per_rank // config.micro_lanes * len(part.stages) > visits  # by an earlier backward
    there = summed or effective_stage(config) == 3  # whose buffer of gradients lasts from the start
    beginning = lasting - (0 if there else states.gradients) + kept + moment + buffers + early
    ending = lasting + last + buffers + buckets
    return PeakBytes(
        states=states.total,
        carried=2 * carried,
        activations=kept,
        logits=logits,
        working=working,
        buffers=buffers,
        buckets=buckets,
        step=step,
        peak=max(beginning, ending, lasting + step),
    )


def step_bytes(config: RunConfig, part: Part) -> float:
    """What the optimizer's step needs beyond the states: the bucket, flat gradients and AdamW's denominators.

    DeepSpeed lets go of a bucket when it needs the next one. When AdamW begins under ZeRO 1, the gradients that were
    added up are gone: they lie in its flat ones.
    """
    if config.parallel.offload_optimizer:
        return 0.0
    stage, low_precision = effective_stage(config), config.train.precision == "bf16"
    bucket = float(min(BUCKET_ELEMENTS, part.parameters) * (2 if low_precision else FP32_BYTES))
    adamw = FP32_BYTES * 2.0 * part.largest_group
    if stage > 1:
        return bucket + adamw + (0 if low_precision or stage == 3 else FP32_BYTES * part.largest_group)
    others = FP32_BYTES * (part.parameters - part.partition)  # gradients that other ranks' states need
    return bucket + max(0.0, adamw - others)


def _buckets(config: RunConfig, part: Part, on_cuda: bool) -> tuple[float, float]:
    """(when a backward begins, when it ends), where each backward reduces: the bucket and its flat copy on the way.

    Under stage 2 each backward allocates it; on CPU it takes memory as it fills.
    """
    stage, weight_bytes = effective_stage(config), NUMBER_BYTES[config.train.precision]
    bucket = float(min(BUCKET_ELEMENTS, part.parameters) * weight_bytes) if stage > 1 else 0.0
    return bucket if stage == 3 or on_cuda else 0.0, 2 * bucket


def _buffers(config: RunConfig, part: Part) -> float:
    """A gradient that was just computed, and the weights that ZeRO 3 gathered."""
    weight_bytes = NUMBER_BYTES[config.train.precision]
    gathered = min(LIVE_ELEMENTS, part.parameters) if effective_stage(config) == 3 else 0
    return float((part.largest_parameter + gathered) * weight_bytes)
