"""What DeepSpeed keeps of a rank's parameters under each ZeRO stage, and where, without DeepSpeed.

The rules are those of DeepSpeed 0.19 under the settings of `parallel/zero.py`; tests/plan/test_processes.py holds them
to the buffers of real engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from infini_train.config.run import RunConfig
from infini_train.model.caching import NUMBER_BYTES

FP32_BYTES = 4
STATES = 3  # what is kept of a parameter in fp32: its master and two moments
ALIGNMENT_NUMEL = 2  # stages 1 and 2 fill a group of parameters up to a multiple of it for each rank
PERSISTENT_NUMEL = 100_000  # stage 3 keeps parameters of up to this size whole on every rank


class Partition(NamedTuple):
    """A rank's part of its parameters' optimizer states, in elements.

    `buffer` includes what the flat buffers are filled up with; `whole` is the flat weights' buffer of all ranks.
    `held` is a number a parameter; `touched` counts the parameters that lie here, if only in part, in full.
    """

    buffer: int
    whole: int
    held: tuple[int, ...]
    touched: int


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Weights, gradients that add up until the step, fp32 masters, and AdamW's two moments."""

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments


def effective_stage(config: RunConfig) -> int:
    """The ZeRO stage that runs: `Engine` raises 1 to 2 under bf16."""
    stage = config.parallel.zero_stage
    return 2 if stage == 1 and config.train.precision == "bf16" else stage


def divide_states(groups: Sequence[Sequence[int]], stage: int, rank: int, ranks: int) -> Partition:
    """This rank's part.

    Args:
        groups: elements of each parameter, by AdamW group.
        stage: of ZeRO.
        rank: in the group of all data- and context-parallel ranks.
        ranks: of that group.
    """
    buffer = whole = touched = 0
    held: list[int] = []
    for group in groups:
        if stage == 3:  # each parameter is divided for itself
            parts = [-(-numel // ranks) for numel in group]
            held += [max(0, min(part, numel - rank * part)) for numel, part in zip(group, parts, strict=True)]
            buffer, whole, touched = buffer + sum(parts), whole + sum(parts) * ranks, touched + sum(parts)
            continue
        unit = ALIGNMENT_NUMEL * ranks
        part = -(-sum(group) // unit) * ALIGNMENT_NUMEL
        first, offset = rank * part, 0
        for numel in group:
            common = max(0, min(offset + numel, first + part) - max(offset, first))
            held.append(common)
            touched += numel if common else 0
            offset += numel
        buffer, whole = buffer + part, whole + part * ranks
    return Partition(buffer, whole, tuple(held), touched)


def count_bytes(
    config: RunConfig, stage: int, partition: Partition, numels: Sequence[int], frozen: int = 0
) -> tuple[StateBytes, StateBytes]:
    """Bytes in the device's memory, and in the host's (`parallel.offload_optimizer`).

    Args:
        config: precision and offload.
        stage: of ZeRO.
        partition: of this rank.
        numels: elements of this rank's parameters that are trained.
        frozen: elements of those that are not, which have no states.
    """
    weight_bytes = NUMBER_BYTES[config.train.precision]
    offload = config.parallel.offload_optimizer
    weights = partition.whole
    if stage == 3:
        weights = partition.buffer + sum(numel for numel in numels if numel <= PERSISTENT_NUMEL)
    if stage == 1:
        gradients = sum(numels)
    elif stage == 2 and weight_bytes == FP32_BYTES:
        gradients = partition.touched
    else:
        gradients = partition.buffer
    masters, moments = FP32_BYTES * partition.buffer, 2 * FP32_BYTES * partition.buffer
    on_device = StateBytes(weights=weight_bytes * (weights + frozen), gradients=FP32_BYTES * gradients)
    if not offload:
        both = StateBytes(weights=on_device.weights, gradients=on_device.gradients, masters=masters, moments=moments)
        return both, StateBytes()
    # AdamW reads the masters' gradients from a buffer in host memory
    read = FP32_BYTES * partition.buffer
    if stage == 1 or (stage == 2 and weight_bytes < FP32_BYTES):
        return on_device, StateBytes(gradients=read, masters=masters, moments=moments)
    host = StateBytes(gradients=read + on_device.gradients, masters=masters, moments=moments)
    return StateBytes(weights=on_device.weights), host
