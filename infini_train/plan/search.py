"""The best layouts of a run on a cluster: all that the config's own checks allow, by predicted tokens a second.

The batch (lanes and window) stays as the config has it, since it decides what is learned.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from infini_train.config.errors import ConfigError
from infini_train.config.parallel import ParallelConfig
from infini_train.config.run import RunConfig
from infini_train.plan.hardware import Hardware
from infini_train.plan.parts import Part, find_parts
from infini_train.plan.peak import find_peak
from infini_train.plan.rehearsal import find_costs
from infini_train.plan.timing import Prediction, predict

EQUAL = 0.02  # of the step's time
FIELDS = (
    "tensor_size",
    "sequence_parallel",
    "pipeline_size",
    "virtual_stages",
    "context_size",
    "data_size",
    "zero_stage",
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, what it is predicted to do, and the fullest of its ranks."""

    config: RunConfig
    prediction: Prediction
    peak_bytes: float

    def overrides(self, base: RunConfig) -> list[str]:
        """The fields that differ from the config that was asked about, as arguments of --set."""
        found = [
            f"parallel.{name}={_yaml(getattr(self.config.parallel, name))}"
            for name in FIELDS
            if getattr(self.config.parallel, name) != getattr(base.parallel, name)
        ]
        for name in ("micro_batch_lanes", "activation_checkpointing"):
            if getattr(self.config.train, name) != getattr(base.train, name):
                found.append(f"train.{name}={_yaml(getattr(self.config.train, name))}")
        return found


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was found: candidates that fit, the fastest first; among equally fast ones the smallest."""

    base: RunConfig
    processes: int
    valid: int
    fitting: int
    candidates: tuple[Candidate, ...]


def divisors(number: int) -> list[int]:
    """From the smallest to the largest."""
    return [each for each in range(1, number + 1) if number % each == 0]


def _divide(processes: int, max_tensor: int, max_pipeline: int) -> Iterator[tuple[int, int, int]]:
    """Tensor, pipeline and context sizes whose product divides the processes."""
    for tensor in divisors(processes):
        for pipeline in divisors(processes // tensor):
            if tensor <= max_tensor and pipeline <= max_pipeline:
                yield from ((tensor, pipeline, context) for context in divisors(processes // (tensor * pipeline)))


def enumerate_layouts(base: RunConfig, hardware: Hardware, processes: int) -> Iterator[RunConfig]:
    """Every valid layout: tensor parallelism stays within a node, checkpointing on and off, ZeRO 1 to 3."""
    model, train = base.model, base.train
    for tensor, pipeline, context in _divide(processes, hardware.devices_per_node, model.num_layers):
        data = processes // (tensor * pipeline * context)
        if train.batch_lanes % data:
            continue
        for micro, virtual, zero, checkpointing in itertools.product(
            divisors(train.batch_lanes // data),
            (1, 2, 4) if pipeline > 1 else (1,),
            (1, 2, 3) if pipeline == 1 else (1, 2),
            ("none", "layer"),
        ):
            if zero == 2 and train.precision == "bf16":
                continue  # what 1 runs as
            try:
                parallel = ParallelConfig(
                    tensor_size=tensor,
                    sequence_parallel=tensor > 1,
                    pipeline_size=pipeline,
                    virtual_stages=virtual,
                    context_size=context,
                    data_size=data,
                    zero_stage=zero,  # type: ignore[arg-type]
                    offload_optimizer=base.parallel.offload_optimizer,
                    timeout_s=base.parallel.timeout_s,
                )
                yield dataclasses.replace(
                    base,
                    parallel=parallel,
                    train=dataclasses.replace(
                        train,
                        micro_batch_lanes=micro,
                        activation_checkpointing=checkpointing,  # type: ignore[arg-type]
                    ),
                )
            except ConfigError:
                continue


def fullest(config: RunConfig, hardware: Hardware, parts: list[Part]) -> float:
    """Bytes at the peak of the rank that needs most."""
    costs = find_costs(config, hardware.device == "cuda")
    return max(find_peak(config, costs, part, part.device, part.carried_bytes).peak for part in parts)


def search(base: RunConfig, hardware: Hardware, processes: int) -> Search:
    """Ranks all layouts of this many processes.

    Raises:
        ConfigError: no layout is valid, or none fits.
    """
    valid, fitting, least = 0, [], float("inf")
    parts_of: dict[ParallelConfig, list[Part]] = {}  # neither micro-batches nor recomputation change them
    for config in enumerate_layouts(base, hardware, processes):
        valid += 1
        if config.parallel not in parts_of:
            parts_of[config.parallel] = find_parts(config)
        parts = parts_of[config.parallel]
        peak = fullest(config, hardware, parts)
        least = min(least, peak)
        if peak <= hardware.usable_bytes:
            fitting.append(Candidate(config=config, prediction=predict(config, hardware, parts), peak_bytes=peak))
    if not valid:
        raise ConfigError(
            f"layouts: none divides {base.train.batch_lanes} lanes of {base.train.window_tokens} tokens over"
            f" {processes} processes; change train.batch_lanes, train.window_tokens or the number of nodes"
        )
    if not fitting:
        raise ConfigError(
            f"layouts: none of {valid} fits: the smallest needs {least / 1e9:.1f} GB of"
            f" {hardware.usable_bytes / 1e9:.1f} GB a device; use more nodes or a shorter train.window_tokens"
        )
    # steps that differ by less than the prediction's own error count as equal: then the emptier memory wins
    ranked = sorted(fitting, key=lambda each: (int(math.log(each.prediction.step_s) / EQUAL), each.peak_bytes))
    return Search(base=base, processes=processes, valid=valid, fitting=len(fitting), candidates=tuple(ranked))
