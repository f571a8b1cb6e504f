"""What each rank of a layout holds, from the modules that it would build, on the meta device.

Numbers are counted from the modules, or come from running them on the meta device; the processes, the cluster and the
data need not exist.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from infini_train.config.errors import ConfigError
from infini_train.config.parallel import ParallelConfig
from infini_train.config.run import RunConfig, divide_processes
from infini_train.model.caching import NUMBER_BYTES, cached_bytes, caching_layers
from infini_train.model.flops import forward_flops_per_token
from infini_train.model.layers import HeadLinear
from infini_train.model.mixer import Projections
from infini_train.model.slices import find_slice
from infini_train.model.stages import Stage
from infini_train.model.transformer import Transformer
from infini_train.parallel import device, mesh
from infini_train.parallel.context import ContextRanks
from infini_train.parallel.mesh import ModelParallelUnit, Place
from infini_train.parallel.pipeline import Carried
from infini_train.plan.hardware import Hardware, load_hardware
from infini_train.plan.parts import Part, count_state_bytes, find_parts
from infini_train.plan.peak import PeakBytes, find_peak
from infini_train.plan.rehearsal import (
    build_stages,
    build_transformer,
    distinct_layers,
    find_costs,
    pretending,
    training_dtype,
)
from infini_train.plan.states import FP32_BYTES, STATES, StateBytes, count_bytes, divide_states, effective_stage
from infini_train.plan.timing import Prediction, predict
from infini_train.plan.traffic import Collective, find_collectives
from infini_train.train.carry import Lanes, carry_fragments
from infini_train.train.optim import parameter_groups

Span = tuple[int, int]  # first and last, exclusive


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """What one rank holds. Spans count from 0 in the whole model, window or batch; None: nothing of it.

    Attributes:
        layers: of each stage on this rank, in the order in which a micro-batch meets them.
        heads, kv_heads: None where the attention has no such projections.
        embedding_rows, head_rows: rows of the vocabulary.
        tokens: of every lane's window.
        parameters: elements, copies that other ranks hold too included.
        owned_parameters: those that this rank writes: summed over all ranks they are the model.
        device, host: between the last backward and the step, when there is most.
        carried_lane_bytes: state of one lane that is carried from window to window.
        carried_bytes: of all lanes of this rank.
        sent_bytes: what context parallelism makes this rank send for one lane, forward and backward, in the layer
            that sends most.
        checkpoint_bytes: tensors that this rank writes.
        memory: of the device at its fullest, predicted.
        collectives: what the rank takes part in, one step.
    """

    rank: int
    place: Place
    layers: tuple[Span, ...]
    heads: Span | None
    kv_heads: Span | None
    embedding_rows: Span | None
    head_rows: Span | None
    tokens: Span
    lanes: Span
    micro_batches: int
    micro_batch_lanes: int
    parameters: int
    owned_parameters: int
    device: StateBytes
    host: StateBytes
    carried_lane_bytes: int
    carried_bytes: int
    sent_bytes: Span
    checkpoint_bytes: int
    memory: PeakBytes
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout and its ranks. Parameters, memory and checkpoint are of the whole model."""

    config: RunConfig
    world_size: int
    zero_stage: int  # that runs: `Engine` raises 1 to 2 under bf16
    parameters: int
    carried_lane_bytes: int
    caching_layers: tuple[int, ...]  # they keep keys and values of all they read outside training
    cached_token_bytes: dict[str, int]  # of one lane, all these layers and heads together, by precision
    checkpoint_bytes: int
    hardware: Hardware
    prediction: Prediction
    flops_per_token: dict[str, float]  # of a forward, by part; backward takes twice, recomputation as much again
    notes: tuple[str, ...]
    ranks: tuple[RankPlan, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values; the config's layout instead of the whole config."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "config"}
        values["parallel"] = dataclasses.asdict(self.config.parallel)
        values["ranks"] = [
            {
                **dataclasses.asdict(each),
                "place": dict(each.place._asdict()),
                "collectives": [{**dataclasses.asdict(one), "sent_bytes": one.sent_bytes} for one in each.collectives],
            }
            for each in self.ranks
        ]
        values["hardware"] = dataclasses.asdict(self.hardware)
        values["prediction"] = dataclasses.asdict(self.prediction)
        return {"name": self.config.name, **values}


def dry_run(
    config: RunConfig,
    world_size: int | None = None,
    ranks: Iterable[int] | None = None,
    hardware: Hardware | None = None,
) -> Plan:
    """Builds ranks one after the other. Leaves the process groups that this process was in.

    Args:
        config: its data need not exist.
        world_size: processes; None: as few as the config allows.
        ranks: those to plan; None: the first of each pipeline stage.
        hardware: to predict memory and time for; None: an H100.

    Raises:
        ConfigError: the processes can't be divided like that, or there is no such rank.
    """
    config, size = _divide(config, world_size)
    hardware = hardware or load_hardware("h100")
    stages, parts = config.parallel.pipeline_size, find_parts(config)
    chosen = [stage * (size // stages) for stage in range(stages)] if ranks is None else list(ranks)
    for rank in chosen:
        if not 0 <= rank < size:
            raise ConfigError(f"rank: {rank} is none of the {size} ranks; choose one from 0 to {size - 1}")
    try:
        with pretending(ParallelConfig()) as place:
            whole = build_stages(config.model, ParallelConfig(), place, config.train.precision)
            lane_bytes = _carried_bytes(whole.initial_carried(1, 1))
            parameters = sum(parameter.numel() for parameter in whole.parameters())
            groups = parameter_groups(whole.named_globally(), config.optim)
            trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        carried = lane_bytes * config.train.batch_lanes if config.train.carry_memory else 0
        flops = forward_flops_per_token(config.model, config.train.window_tokens)
        planned = tuple(plan_rank(config, rank, size, parts, hardware) for rank in chosen)
        return Plan(
            config=config,
            world_size=size,
            zero_stage=effective_stage(config),
            parameters=parameters,
            carried_lane_bytes=lane_bytes,
            caching_layers=caching_layers(config.model),
            cached_token_bytes={each: cached_bytes(config.model, each) for each in NUMBER_BYTES},
            checkpoint_bytes=_stored_bytes(config, trained, parameters - trained) + carried,
            hardware=hardware,
            prediction=predict(config, hardware, parts),
            flops_per_token=flops._asdict(),
            notes=(*find_notes(config), *find_warnings(planned, hardware)),
            ranks=planned,
        )
    finally:
        mesh.stop()


def _divide(config: RunConfig, world_size: int | None) -> tuple[RunConfig, int]:
    parallel = config.parallel
    needed = parallel.model_size * (parallel.data_size or 1)
    size = needed if world_size is None else world_size
    if size < 1 or size % needed or (parallel.data_size is not None and size != needed):
        what = f"{'a multiple of ' if parallel.data_size is None else ''}{needed}"
        raise ConfigError(f"world_size: {size} processes, but the parallel section needs {what}; change one of them")
    return divide_processes(config, size), size


def plan_rank(config: RunConfig, rank: int, world_size: int, parts: list[Part], hardware: Hardware) -> RankPlan:
    """What one rank holds; `config` has its `parallel.data_size`. Joins fake process groups."""
    costs = find_costs(config, hardware.device == "cuda")  # before this rank's groups are joined
    place = mesh.pretend(config.parallel, rank, world_size)
    stages = build_stages(config.model, config.parallel, place, config.train.precision)
    lanes = Lanes.of(config, place.data[0])
    micro_batches = config.lanes_per_rank // config.micro_lanes
    carried = stages.initial_carried(config.micro_lanes, micro_batches, config.train.carry_memory)
    tokens = config.train.window_tokens // place.context[1]
    numels = [parameter.numel() for parameter in stages.parameters()]
    owned = [parameter.numel() for parameter in stages.parameters() if find_slice(parameter).owned]
    zero_stage, groups = effective_stage(config), parameter_groups(stages.named_globally(), config.optim)
    data_rank, data_ranks = ModelParallelUnit.get_data_parallel_rank(), ModelParallelUnit.get_data_parallel_world_size()
    members = [parameter for group in groups for parameter in group["params"]]
    trained = {id(parameter) for parameter in members}
    frozen = [parameter for parameter in stages.parameters() if id(parameter) not in trained]
    partition = divide_states(
        [[parameter.numel() for parameter in group["params"]] for group in groups], zero_stage, data_rank, data_ranks
    )
    frozen_numel = sum(parameter.numel() for parameter in frozen)
    device, host = count_bytes(config, zero_stage, partition, [p.numel() for p in members], frozen_numel)
    held = zip(members, partition.held, strict=True)
    written = sum(numel for parameter, numel in held if find_slice(parameter).owned)
    kept = sum(p.numel() for p in frozen if find_slice(p).owned) if place.data[0] == place.context[0] == 0 else 0
    fragments = carry_fragments(stages, carried, lanes)
    part, carried_bytes = parts[place.pipeline[0]], _carried_bytes(carried)
    return RankPlan(
        rank=rank,
        place=place,
        **_describe_parts(stages.transformers()),
        tokens=(place.context[0] * tokens, (place.context[0] + 1) * tokens),
        lanes=(lanes.first, lanes.first + config.lanes_per_rank),
        micro_batches=micro_batches,
        micro_batch_lanes=config.micro_lanes,
        parameters=sum(numels),
        owned_parameters=0 if place.is_replica else sum(owned),
        device=device,
        host=host,
        carried_lane_bytes=_carried_bytes(stages.initial_carried(1, 1)),
        carried_bytes=carried_bytes,
        sent_bytes=_count_sent(config, place, stages.transformers()[0].stage),
        checkpoint_bytes=_stored_bytes(config, written, kept) + sum(each.tensor.nbytes for each in fragments),
        memory=find_peak(config, costs, part, device, carried_bytes),
        collectives=tuple(find_collectives(config, costs, part)),
    )


def _stored_bytes(config: RunConfig, trained: int, frozen: int) -> int:
    """What a checkpoint holds of so many elements: all states in fp32, or the weights alone as they are."""
    return STATES * FP32_BYTES * trained + NUMBER_BYTES[config.train.precision] * frozen


def _carried_bytes(carried: Carried) -> int:
    return sum(count_state_bytes(state) for of_stage in carried for state in of_stage)


def _describe_parts(transformers: list[Transformer]) -> dict[str, Any]:
    """The fields of `RankPlan` that say which part of the model the modules are."""
    projections = next((each for each in transformers[0].modules() if isinstance(each, Projections)), None)
    first, last = transformers[0], transformers[-1]
    embedding = _rows(first.embedding.weight) if first.stage.embeds else None
    head = None
    if last.stage.predicts:
        head = embedding if last.config.tied_embeddings else _rows(last.head.weight)
    return {
        "layers": tuple((each.stage.first_layer, each.stage.last_layer) for each in transformers),
        "heads": None if projections is None else _heads(projections.linear_q, projections.key_dim),
        "kv_heads": None if projections is None else _heads(projections.linear_k, projections.key_dim),
        "embedding_rows": embedding,
        "head_rows": head,
    }


def _heads(projection: nn.Module, size: int) -> Span:
    if isinstance(projection, HeadLinear):  # the whole weight, of which this rank uses one head
        return projection.rows.start // size, projection.rows.stop // size
    first, stop = _rows(projection.weight)
    return first // size, stop // size


def _rows(weight: torch.Tensor) -> Span:
    piece = find_slice(weight)
    return piece.start[0], piece.start[0] + piece.shape[0]


def _count_sent(config: RunConfig, place: Place, stage: Stage) -> Span:
    """(forward, backward) of one lane in the layer of the stage that sends most: its layers run on the meta device."""
    if place.context[1] == 1:
        return 0, 0
    ranks = ContextRanks(parallel_state.get_context_parallel_group())
    tokens, dtype = config.train.window_tokens, training_dtype(config.train.precision)
    with device.on_meta():
        inner = stage._replace(embeds=False, predicts=False)
        transformer = build_transformer(config.model, inner, config.train.precision, ranks=ranks)
        marks = torch.zeros(1, tokens, dtype=torch.bool), torch.ones(1, tokens)
        grids = transformer.make_grids(*marks, None, ranks.shard)
        sent = []
        for layer in distinct_layers(transformer).values():
            hidden_TBD = torch.empty(tokens // ranks.size, 1, config.model.hidden_size, dtype=dtype, requires_grad=True)
            before = ranks.sent_bytes
            out_TBD, _ = layer(hidden_TBD, None, grids.of(layer.attention.layout))
            forward = ranks.sent_bytes
            out_TBD.sum().backward()
            sent.append((forward - before, ranks.sent_bytes - forward))
    return max(sent, key=sum)


def find_warnings(ranks: Iterable[RankPlan], hardware: Hardware) -> Iterable[str]:
    """Ranks that won't fit into their device."""
    for rank in ranks:
        if rank.memory.peak > hardware.usable_bytes:
            yield (
                f"warning: rank {rank.rank} needs {rank.memory.peak / 1e9:.1f} GB, and {hardware.name} leaves"
                f" {hardware.usable_bytes / 1e9:.1f} GB; see infini-train plan --search"
            )


def find_notes(config: RunConfig) -> Iterable[str]:
    """What runs but wastes something; what can't run is refused when the config is read."""
    model, parallel = config.model, config.parallel
    if parallel.tensor_size > model.kv_heads:
        copies = parallel.tensor_size // model.kv_heads
        yield (
            f"parallel.tensor_size {parallel.tensor_size} with {model.kv_heads} key-value heads: {copies} ranks hold"
            " and compute each memory, and every rank has all key and value projections"
        )
    if config.train.teacher is not None:
        yield "train.teacher: its forward pass and its logits are not counted, neither in time nor in memory"
    if config.optim.rules:
        yield "optim.rules: times and the peak count the gradients of all weights, also of those that are not trained"
    stages = parallel.pipeline_size * parallel.virtual_stages
    if model.num_layers % stages:
        yield f"model.num_layers {model.num_layers} over {stages} stages: the first ones have a layer more, others wait"
    micro_batches = config.lanes_per_rank // config.micro_lanes
    if micro_batches < parallel.pipeline_size:
        yield (
            f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} for parallel.pipeline_size"
            f" {parallel.pipeline_size}: most stages wait; lower train.micro_batch_lanes or raise train.batch_lanes"
        )
    replicas = (parallel.data_size or 1) * parallel.context_size
    if parallel.zero_stage > 1 and replicas == 1:
        yield f"parallel.zero_stage {parallel.zero_stage} with one data- and context-parallel rank divides nothing"
