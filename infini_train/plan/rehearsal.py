"""Runs the modules of training on the meta device, to find what a layer and the ends of a model cost.

The model is built as training builds it, for the first tensor- and context-parallel rank, and its layers are run one by
one under `tracing`. A layer is known by its modules' classes, its parameters' shapes and its state's: each distinct one
is run once for each distinct call (a recurrent stack calls its layers segment by segment). What surrounds the layers is
what the model does when they pass their input on. Results are kept, so that a search is fast.

Nothing here knows a variant of attention.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from infini_train.config.errors import ConfigError
from infini_train.config.model import ModelConfig
from infini_train.config.parallel import ParallelConfig
from infini_train.config.run import RunConfig
from infini_train.model.layers import parallel_config
from infini_train.model.stages import Stage
from infini_train.model.transformer import Transformer
from infini_train.ops.chunked_loss import chunk_tokens
from infini_train.ops.ranks import Ranks
from infini_train.parallel import device, mesh
from infini_train.parallel.context import ContextRanks
from infini_train.parallel.pipeline import Stages
from infini_train.plan.costs import Cost, Costs
from infini_train.plan.tracing import Sink, Source, tracing

# Costs of more lanes are extrapolated from these two: a constant, and an amount per lane. One lane differs: transposed
# activations are contiguous there and are not copied.
LANES = (2, 3)
DIRECT_CHUNKS = 4  # of the loss; more are extrapolated


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """All that costs depend on, but for the lanes."""

    model: ModelConfig
    tensor_size: int
    sequence_parallel: bool
    context_size: int
    window_tokens: int
    carry_memory: bool
    precision: str
    on_cuda: bool


def find_costs(config: RunConfig, on_cuda: bool) -> Costs:
    """The costs under this config's layout, the same on all ranks.

    The first call for a shape leaves the process groups that this process was in.

    Args:
        config: with any `parallel.data_size`.
        on_cuda: count CUDA's kernels for attention and norms.
    """
    parallel, train = config.parallel, config.train
    shape = _Shape(
        model=config.model,
        tensor_size=parallel.tensor_size,
        sequence_parallel=parallel.sequence_parallel,
        context_size=parallel.context_size,
        window_tokens=train.window_tokens,
        carry_memory=train.carry_memory,
        precision=train.precision,
        on_cuda=on_cuda,
    )
    return _extrapolate(shape, config.micro_lanes)


@functools.lru_cache(maxsize=4096)
def _extrapolate(shape: _Shape, lanes: int) -> Costs:
    if lanes <= LANES[0]:
        return _rehearse(shape, lanes)
    few, more = (_rehearse(shape, each) for each in LANES)
    share = (lanes - LANES[0]) / (LANES[1] - LANES[0])
    known: dict[tuple[int, int], Cost] = {}

    def extend(one: Cost, two: Cost) -> Cost:
        pair = (id(one), id(two))  # equal layers share their cost
        if pair not in known:
            known[pair] = one.times(1 - share) + two.times(share)
        return known[pair]

    return Costs(
        layers=tuple(map(extend, few.layers, more.layers)),
        embedding=extend(few.embedding, more.embedding),
        head=_find_head(shape, lanes),
        stack=extend(few.stack, more.stack),
        on_cuda=shape.on_cuda,
    )


@functools.lru_cache(maxsize=1024)
def _rehearse(shape: _Shape, lanes: int) -> Costs:
    alike, head = _find_alike(shape.model), _find_head(shape, lanes)
    stage = Stage(0, max(alike) + 1)
    with pretending(_parallel(shape)), device.on_meta(), _explaining(shape.model):
        model = build_transformer(shape.model, stage, shape.precision, shape.sequence_parallel)
        model.layers = nn.ModuleDict({str(number): model.layers[str(number)] for number in dict.fromkeys(alike)})
        return _Rehearsal(model, shape, lanes).run(alike, head)


def _find_head(shape: _Shape, lanes: int) -> Cost:
    """Many chunks of tokens are extrapolated from a few: each adds the same work, and none needs more room."""
    tokens = lanes * shape.window_tokens // shape.context_size
    period = shape.tensor_size * chunk_tokens(shape.model.vocab_size // shape.tensor_size)
    if tokens <= DIRECT_CHUNKS * period:
        return _rehearse_head(shape, tokens)
    few = 2 * period + tokens % period  # the second one begins to add to the first
    share = (tokens - few) / period
    return _rehearse_head(shape, few).times(1 - share) + _rehearse_head(shape, few + period).times(share)


@functools.lru_cache(maxsize=1024)
def _rehearse_head(shape: _Shape, tokens: int) -> Cost:
    with pretending(_parallel(shape)), device.on_meta():
        model = build_transformer(shape.model, Stage(0, 0), shape.precision, shape.sequence_parallel)
        hidden_TBD, ids_BT = _make_inputs(shape, 1, tokens)
        factors_BT = torch.empty(ids_BT.shape)

        def run(source: Callable[[Tensor], Tensor]) -> Tensor:
            return model.losses(source(hidden_TBD), source(ids_BT), source(factors_BT))

        return _trace(run, model, hidden_TBD, shape.on_cuda)


def _parallel(shape: _Shape) -> ParallelConfig:
    return ParallelConfig(
        tensor_size=shape.tensor_size,
        sequence_parallel=shape.sequence_parallel,
        context_size=shape.context_size,
        data_size=1,
    )


def _make_inputs(shape: _Shape, lanes: int, tokens: int) -> tuple[Tensor, Tensor]:
    """hidden_TBD and ids_BT of this rank, on the meta device."""
    rows = tokens // shape.tensor_size if shape.sequence_parallel else tokens
    dtype = training_dtype(shape.precision)
    hidden_TBD = torch.empty(rows, lanes, shape.model.hidden_size, dtype=dtype, requires_grad=True)
    return hidden_TBD, torch.empty(lanes, tokens, dtype=torch.int64)


@contextlib.contextmanager
def _explaining(model: ModelConfig) -> Iterator[None]:
    """A module that asks for values, which the meta device has not, is the variant's limitation, in one line."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "meta" not in str(error).lower():
            raise
        problem = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"model.attention.kind: {model.attention.kind} can't be planned: its module needs values, and a plan has"
            f" none ({problem}); choose operations by shapes alone"
        ) from error


@functools.lru_cache(maxsize=64)
def _find_alike(model: ModelConfig) -> tuple[int, ...]:
    """For each layer the number of the first one that does the same work."""
    with pretending(ParallelConfig(data_size=1)), device.on_meta():
        transformer = build_transformer(model, Stage(0, model.num_layers), "fp32")
        kinds = _find_kinds(transformer)
    return tuple(kinds.index(kind) for kind in kinds)


@contextlib.contextmanager
def pretending(parallel: ParallelConfig) -> Iterator[mesh.Place]:
    """The first rank of this layout in fake process groups. Leaves all groups that this process was in."""
    place = mesh.pretend(parallel, 0, parallel.model_size * (parallel.data_size or 1))
    try:
        yield place
    finally:
        mesh.stop()


def build_stages(model: ModelConfig, parallel: ParallelConfig, place: mesh.Place, precision: str) -> Stages:
    """This rank's modules on the meta device, in the precision of training."""
    dtype = training_dtype(precision)
    with torch.device("meta"):
        stages = Stages(model, parallel, place, dtype=dtype)
    return stages.to(dtype)  # as the engine does


def build_transformer(
    model: ModelConfig, stage: Stage, precision: str, sequence_parallel: bool = False, ranks: Ranks | None = None
) -> Transformer:
    """One stage of this rank, inside `device.on_meta`; `ranks` stand in for those of its context-parallel group."""
    if ranks is None and parallel_state.get_context_parallel_world_size() > 1:
        ranks = ContextRanks(parallel_state.get_context_parallel_group())
    parallel = parallel_config(sequence_parallel=sequence_parallel)
    return Transformer(model, parallel, stage=stage, ranks=ranks).to(training_dtype(precision))


def training_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _find_kinds(model: Transformer) -> list[Any]:
    """A value per layer, equal for layers that do the same work."""
    state = model.initial_state(1)
    states = [None] * len(model.layers) if state is None else list(state)
    return [
        (model.config.layers[int(number)], *_describe_layer(layer, state))
        for (number, layer), state in zip(model.layers.items(), states, strict=True)
    ]


def distinct_layers(model: Transformer) -> dict[Any, nn.Module]:
    """The first layer of each kind."""
    found: dict[Any, nn.Module] = {}
    for kind, layer in zip(_find_kinds(model), model.layers.values(), strict=True):
        found.setdefault(kind, layer)
    return found


def _describe_layer(layer: nn.Module, state: Any) -> tuple[Any, ...]:
    classes = tuple((name, type(module)) for name, module in layer.named_modules())
    parameters = tuple((name, tuple(each.shape), each.dtype) for name, each in layer.named_parameters())
    return classes, parameters, _describe_tree(state)


def _describe_tree(tree: Any) -> Any:
    """Equal for trees of tensors that look alike."""
    leaves, structure = pytree.tree_flatten(tree)
    return tuple(_Outline.of(each) if isinstance(each, Tensor) else each for each in leaves), str(structure)


@dataclass(frozen=True)
class _Outline:
    """What is known of a tensor without values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Outline":
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def make(self) -> Tensor:
        """A tensor on the meta device that looks like it."""
        return torch.empty(self.shape, dtype=self.dtype, requires_grad=self.requires_grad, device="meta")


def _outline(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, _Outline.of, tree)


def _make(tree: Any) -> Any:
    return pytree.tree_map_only(_Outline, _Outline.make, tree)


@dataclass
class _Calls:
    """Calls of one layer: the cost and the outlined result of each distinct one, and the order in which they come."""

    known: dict[Any, tuple[Cost, Any]] = field(default_factory=dict)
    order: list[Any] = field(default_factory=list)

    @property
    def cost(self) -> Cost:
        """All calls of one micro-batch together."""
        costs = [self.known[key][0].called(self.order.count(key)) for key in self.known]
        total = functools.reduce(Cost.__add__, costs)
        return dataclasses.replace(total, working_bytes=max(each.working_bytes for each in costs))


class _Rehearsal:
    """A whole model of which only distinct layers are left, and the inputs of one micro-batch."""

    def __init__(self, model: Transformer, shape: _Shape, lanes: int) -> None:
        self.model, self.on_cuda = model, shape.on_cuda
        self.state = model.initial_state(lanes) if shape.carry_memory else None
        marks = torch.zeros(lanes, shape.window_tokens, dtype=torch.bool), torch.ones(lanes, shape.window_tokens)
        self.grids = model.make_grids(*marks, self.state, (0, shape.context_size))
        self.hidden_TBD, self.ids_BT = _make_inputs(shape, lanes, shape.window_tokens // shape.context_size)

    def run(self, alike: tuple[int, ...], head: Cost) -> Costs:
        """The costs of a model with this head, each of whose layers does the same work as the one of this number."""
        model, whole = self.model, self.model.stage
        calls = self._run_layers()
        layers = {number: of_layer.cost for number, of_layer in zip(dict.fromkeys(alike), calls, strict=True)}
        for layer, of_layer in zip(model.layers.values(), calls, strict=True):
            states = [_make(of_layer.known[key][1][1]) for key in of_layer.order]
            layer.forward = functools.partial(_pass_on, states, [])
        stack, embedding = (self._run_stage(whole._replace(embeds=embeds, predicts=False)) for embeds in (False, True))
        for layer in model.layers.values():
            del layer.forward
        return Costs(
            layers=tuple(layers[number] for number in alike),
            embedding=embedding.without(stack),
            head=head,
            stack=stack,
            on_cuda=self.on_cuda,
        )

    def _run_layers(self) -> list[_Calls]:
        """Runs the model; each distinct call of a layer is traced where it comes."""
        calls = [_Calls() for _ in self.model.layers]
        for layer, of_layer in zip(self.model.layers.values(), calls, strict=True):
            layer.forward = functools.partial(self._call_layer, layer, of_layer)
        inputs = self.ids_BT if self.model.stage.embeds else self.hidden_TBD
        self.model(inputs, self.grids, self.state, self.ids_BT)
        for layer in self.model.layers.values():
            del layer.forward
        return calls

    def _call_layer(self, layer: nn.Module, calls: _Calls, *inputs: Any) -> Any:
        key = _describe_tree(inputs)
        calls.order.append(key)
        if key not in calls.known:
            hidden_TBD, *others = _make(_outline(inputs))
            result: list[Any] = []

            def run(source: Callable[[Tensor], Tensor]) -> Tensor:
                output = type(layer).forward(layer, source(hidden_TBD), *others)  # type: ignore[arg-type]
                result.append(_outline(output))
                return output[0]  # type: ignore[no-any-return, index]

            cost = _trace(run, layer, hidden_TBD, self.on_cuda)
            calls.known[key] = (cost, result[0])
        return _make(calls.known[key][1])

    def _run_stage(self, stage: Stage) -> Cost:
        """The model as this stage, around layers that pass their input on."""
        model, whole = self.model, self.model.stage
        inputs = self.ids_BT if stage.embeds else self.hidden_TBD
        model.stage = stage
        try:
            return _trace(
                lambda source: model(source(inputs), self.grids, self.state, None)[0], model, inputs, self.on_cuda
            )
        finally:
            model.stage = whole


def _trace(run: Callable[[Any], Tensor], module: nn.Module, inputs: Tensor, on_cuda: bool) -> Cost:
    """Forward and backward of what `run` returns; it passes its inputs through the function that it is given."""
    with tracing(on_cuda, list(module.parameters())) as trace:
        result = run(Source.apply)
        forward, again = trace.work, trace.saved
        kept_bytes = trace.live_bytes() - result.untyped_storage().nbytes()
        end = Sink.apply(result)  # type: ignore[no-untyped-call]
        del result
        end.backward()
        backward = trace.work + forward.times(-1)
    return Cost(
        forward=forward,
        backward=backward,
        again=again,
        input_bytes=inputs.nbytes,
        kept_bytes=kept_bytes,
        working_bytes=trace.peak_bytes() - kept_bytes,
    )


def _pass_on(states: list[Any], calls: list[None], hidden_TBD: Tensor, *_: Any) -> tuple[Tensor, Any]:
    """In place of a layer's forward: its input, and the state that it left at the same call."""
    calls.append(None)
    return hidden_TBD, states[(len(calls) - 1) % len(states)]
