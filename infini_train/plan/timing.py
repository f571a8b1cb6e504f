"""How long a step takes on a hardware description: work and traffic of each stage, and the pipeline's schedule.

Times add up: nothing is taken to overlap, since DeepSpeed runs here with overlap_comm off and tensor-parallel
collectives wait for what they sum. Where communication is hidden (memories travel while local attention computes), a
step is shorter.
"""

import functools
from dataclasses import dataclass, field

from infini_train.config.run import RunConfig
from infini_train.model.caching import NUMBER_BYTES
from infini_train.model.flops import training_flops_per_token
from infini_train.plan.costs import Costs
from infini_train.plan.hardware import Hardware
from infini_train.plan.parts import Part, find_parts
from infini_train.plan.rehearsal import find_costs
from infini_train.plan.states import FP32_BYTES, effective_stage
from infini_train.plan.traffic import Collective, find_collectives
from infini_train.plan.work import Work

# Passes over numbers, counted on DeepSpeed's stages 1 and 2 and torch's AdamW: bucket, division, flat copy and back;
# norms, flat gradients, clipping, moments, masters, weights.
REDUCTION_PASSES, STEP_PASSES = 16, 28
REDUCTION_LAUNCHES = 14  # for each parameter
STEP_LAUNCHES = 150  # of a step, whatever the model's size


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step of a layout on a hardware.

    Attributes:
        step_s: seconds a step.
        tokens_s: tokens a second of all processes together.
        mfu: useful operations of the model over the peak of all devices.
        bubble: share of a step that a pipeline's ranks wait for each other.
        seconds: of the slowest stage by what it is doing; they add up to step_s.
    """

    step_s: float
    tokens_s: float
    mfu: float
    bubble: float
    seconds: dict[str, float] = field(default_factory=dict)


def work_seconds(work: Work, hardware: Hardware, precision: str) -> dict[str, float]:
    """By kind of work, exchanges aside. On CUDA launches run ahead: only what exceeds the rest counts."""
    attention = (flops / hardware.attention_flops(precision, keys) for keys, flops in work.attention_flops.items())
    found = {
        "matrix products": work.matmul_flops / (hardware.peak_flops(precision) * hardware.matmul_efficiency),
        "attention": sum(attention),
        "elementwise": work.moved_bytes / (1e9 * hardware.memory_gb_s * hardware.memory_efficiency),
    }
    launches = 1e-6 * hardware.launch_us * work.launches
    if hardware.device == "cuda":
        launches = max(0.0, launches - sum(found.values()))
    return {**found, "launches": launches}


def collective_seconds(collective: Collective, hardware: Hardware) -> float:
    """Ranks of one node share its network cards: a ring through them uses the card of each."""
    within = collective.stride * collective.ranks <= hardware.devices_per_node and collective.kind != "send"
    within = within or collective.stride < hardware.devices_per_node == collective.stride * collective.ranks
    kind = collective.kind
    bandwidth, latency = hardware.link(kind, within)
    if not within and kind != "send":
        members = max(1, hardware.devices_per_node // collective.stride)
        bandwidth = min(hardware.link(kind, True)[0], members * bandwidth)
    if kind == "send" and collective.stride < hardware.devices_per_node:
        bandwidth, latency = hardware.link(kind, True)
    return collective.sent_bytes / bandwidth + collective.messages * latency


def micro_batch_work(config: RunConfig, costs: Costs, part: Part) -> Work:
    """Forward and backward of one micro-batch on a rank of this part, what is computed again included."""
    pieces = costs.work(part.stages, config.train.activation_checkpointing == "layer")
    work = functools.reduce(Work.__add__, pieces.values())
    weight_bytes = NUMBER_BYTES[config.train.precision]
    if effective_stage(config) == 1:  # gradients add up where they are
        return work + Work(moved_bytes=3.0 * weight_bytes * part.parameters, launches=part.tensors)
    return work + _reduction(weight_bytes, part)


def _reduction(weight_bytes: int, part: Part) -> Work:
    moved_bytes = float(REDUCTION_PASSES * weight_bytes * part.parameters)
    return Work(moved_bytes=moved_bytes, launches=REDUCTION_LAUNCHES * part.tensors)


def step_work(config: RunConfig, part: Part) -> Work:
    """Once a step: under ZeRO 1 the reduction of gradients, and clipping and AdamW."""
    work = Work(moved_bytes=float(STEP_PASSES * FP32_BYTES * part.partition), launches=STEP_LAUNCHES)
    return work + _reduction(FP32_BYTES, part) if effective_stage(config) == 1 else work


def predict(config: RunConfig, hardware: Hardware, parts: list[Part] | None = None) -> Prediction:
    """The step of a config that has its `parallel.data_size`.

    A pipeline of p stages with m micro-batches: m times the slowest stage, and all others once, a virtual-stage-th of
    it with interleaving (1F1B: (p - 1) / m of a step's work; interleaved: (p - 1) / (v m)).
    """
    parts = parts or find_parts(config)
    costs = find_costs(config, hardware.device == "cuda")
    micro_batches = config.lanes_per_rank // config.micro_lanes
    stages = [_stage_seconds(config, hardware, costs, part, micro_batches) for part in parts]
    totals = [sum(each.values()) for each, _ in stages]
    slowest = max(range(len(parts)), key=totals.__getitem__)
    waiting = (sum(totals) - totals[slowest]) / config.parallel.virtual_stages
    seconds = {name: micro_batches * value for name, value in stages[slowest][0].items()}
    for name, value in stages[slowest][1].items():
        seconds[name] = seconds.get(name, 0.0) + value
    seconds["pipeline bubble"] = waiting
    step_s = sum(seconds.values())
    processes = config.parallel.model_size * (config.parallel.data_size or 1)
    shared = _shared_seconds(config, hardware, stages, processes, micro_batches)
    if shared > step_s:  # more processes than devices: who waits leaves the device to others
        seconds["waiting for a shared core"] = shared - step_s
        step_s = shared
    flops = config.train.tokens_per_step * training_flops_per_token(config.model, config.train.window_tokens)
    devices = processes if hardware.device == "cuda" else min(processes, hardware.devices_per_node)
    return Prediction(
        step_s=step_s,
        tokens_s=config.train.tokens_per_step / step_s,
        mfu=flops / step_s / devices / hardware.peak_flops(config.train.precision),
        bubble=waiting / step_s,
        seconds={name: value for name, value in seconds.items() if value > 0},
    )


def _stage_seconds(
    config: RunConfig, hardware: Hardware, costs: Costs, part: Part, micro_batches: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(of one micro-batch, of the step once)."""
    each = work_seconds(micro_batch_work(config, costs, part), hardware, config.train.precision)
    once = {"optimizer": sum(work_seconds(step_work(config, part), hardware, "fp32").values())}
    for collective in find_collectives(config, costs, part):
        seconds = collective_seconds(collective, hardware)
        where, share = (each, micro_batches) if collective.in_micro_batch else (once, 1)
        where[collective.name] = where.get(collective.name, 0.0) + seconds / share
    return each, once


def _shared_seconds(
    config: RunConfig,
    hardware: Hardware,
    stages: list[tuple[dict[str, float], dict[str, float]]],
    processes: int,
    micro_batches: int,
) -> float:
    """What all processes compute, over the cores of the machine; 0 on devices that nobody shares."""
    if hardware.device == "cuda" or processes <= hardware.devices_per_node:
        return 0.0
    each = sum(micro_batches * sum(a.values()) + sum(b.values()) for a, b in stages)
    return each * (processes // config.parallel.pipeline_size) / hardware.devices_per_node
