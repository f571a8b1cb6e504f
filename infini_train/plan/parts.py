"""A rank's part of the model: its stages, and the sizes of its parameters and of its state.

The sizes are those of the modules of one tensor-parallel rank, which are built once for all pipelines, so that the
search can look at hundreds of layouts. tests/plan/test_search.py compares the parts with the modules of each rank.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from infini_train.config.model import ModelConfig
from infini_train.config.parallel import ParallelConfig
from infini_train.config.run import RunConfig
from infini_train.config.training import OptimConfig
from infini_train.model.stages import Stage, find_stages
from infini_train.plan.rehearsal import build_stages, pretending
from infini_train.plan.states import StateBytes, count_bytes, divide_states, effective_stage
from infini_train.train.optim import parameter_groups


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the ranks of one pipeline stage have.

    Attributes:
        pipeline_rank: where it stands.
        stages: of this rank, more than one under the interleaved schedule.
        parameters: elements of the rank, copies that other ranks hold too included.
        tensors: parameters, each counted as one.
        groups: of AdamW.
        device, host: between the last backward and the step.
        partition: elements of the optimizer states that lie here.
        largest_group: elements of the largest group of parameters there.
        largest_parameter: elements.
        carried_bytes: memories of all lanes of the rank.
    """

    pipeline_rank: int
    stages: tuple[Stage, ...]
    parameters: int
    tensors: int
    groups: int
    device: StateBytes
    host: StateBytes
    partition: int
    largest_group: int
    largest_parameter: int
    carried_bytes: int

    @property
    def layers(self) -> int:
        return sum(stage.last_layer - stage.first_layer for stage in self.stages)

    @property
    def embeds(self) -> bool:
        return self.stages[0].embeds

    @property
    def predicts(self) -> bool:
        return self.stages[-1].predicts


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """One rank's part of a whole model: (AdamW group, elements) of each parameter, in the order of the modules.

    A parameter that is not trained has the group "". `before` and `after` are the parameters before and after the
    layers. `groups` are the groups in their order; `carried` has the bytes of each layer's state for one lane.
    """

    groups: tuple[str, ...]
    before: tuple[tuple[str, int], ...]
    layers: tuple[tuple[tuple[str, int], ...], ...]
    after: tuple[tuple[str, int], ...]
    carried: tuple[int, ...]

    def of_stages(self, stages: Iterable[Stage]) -> tuple[list[list[int]], list[int]]:
        """Elements of each parameter of these stages: by group, and of those that are not trained."""
        found: list[tuple[str, int]] = []
        for stage in stages:
            found += self.before if stage.embeds else ()
            for number in range(stage.first_layer, stage.last_layer):
                found += self.layers[number]
            found += self.after if stage.predicts else ()
        *by_group, frozen = [[numel for name, numel in found if name == group] for group in (*self.groups, "")]
        return [group for group in by_group if group], frozen


@functools.lru_cache(maxsize=64)
def _find_sizes(model: ModelConfig, tensor_size: int, precision: str, optim: OptimConfig) -> _Sizes:
    parallel = ParallelConfig(tensor_size=tensor_size, data_size=1)
    with pretending(parallel) as place:
        transformer = build_stages(model, parallel, place, precision).transformers()[0]
        state = transformer.initial_state(1)
        carried = [0] * model.num_layers if state is None else [count_state_bytes(each) for each in state]
    groups = parameter_groups(transformer.named_parameters(), optim)
    names = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    before: list[tuple[str, int]] = []
    layers: list[list[tuple[str, int]]] = [[] for _ in carried]
    after: list[tuple[str, int]] = []
    for name, parameter in transformer.named_parameters():
        where = after if layers[-1] else before
        if name.startswith("layers."):
            where = layers[int(name.split(".")[1])]
        where.append((names.get(id(parameter), ""), parameter.numel()))
    return _Sizes(
        groups=tuple(group["name"] for group in groups),
        before=tuple(before),
        layers=tuple(map(tuple, layers)),
        after=tuple(after),
        carried=tuple(carried),
    )


def count_state_bytes(state: Any) -> int:
    """Bytes of all tensors of a layer's state."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def find_parts(config: RunConfig) -> list[Part]:
    """One for each pipeline stage; `config` has its `parallel.data_size`. Optimizer states are those of rank 0."""
    parallel = config.parallel
    replicas = (parallel.data_size or 1) * parallel.context_size
    zero_stage = effective_stage(config)
    sizes = _find_sizes(config.model, parallel.tensor_size, config.train.precision, config.optim)
    parts = []
    for rank in range(parallel.pipeline_size):
        stages = tuple(find_stages(config.model.num_layers, parallel, rank))
        groups, frozen = sizes.of_stages(stages)
        partition = divide_states(groups, zero_stage, 0, replicas)
        numels = [numel for group in groups for numel in group]
        device, host = count_bytes(config, zero_stage, partition, numels, sum(frozen))
        carried = sum(sum(sizes.carried[stage.first_layer : stage.last_layer]) for stage in stages)
        parts.append(
            Part(
                pipeline_rank=rank,
                stages=stages,
                parameters=sum(numels) + sum(frozen),
                tensors=len(numels) + len(frozen),
                groups=len(groups),
                device=device,
                host=host,
                partition=partition.buffer,
                largest_group=max((divide_states([g], zero_stage, 0, replicas).buffer for g in groups), default=0),
                largest_parameter=max(numels + frozen),
                carried_bytes=carried * config.lanes_per_rank if config.train.carry_memory else 0,
            )
        )
    return parts
