"""The whole of a run, and the checks that concern several sections. Each part of the program gets its section only."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infini_train.config.attention import InfiniConfig
from infini_train.config.data import DataConfig
from infini_train.config.errors import ConfigError, require
from infini_train.config.model import ModelConfig
from infini_train.config.parallel import ParallelConfig, divide_over_pipeline
from infini_train.config.training import CheckpointConfig, EvalConfig, GuardConfig, LogConfig, OptimConfig, TrainConfig
from infini_train.config.values import FilePath

MAX_MICRO_BATCHES = 4096  # of a rank in one step; each has its own memory


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    name: str = "run"  # names the run's folder
    run_dir: FilePath | None = None  # all that the run writes; null: runs/ and the name
    seed: int = 0  # of the initial weights and the order of documents
    # cuda: a GPU for each process, or an error; cpu: no GPU, even where there is one; auto: GPUs where there are any,
    # and an error where there should be some, but they can't be used
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", "must lie between 0 and 2147483647")
        require(
            self.eval.every_steps is None or self.data.validation is not None,
            "data.validation",
            "is needed because eval.every_steps is set; give a folder of shards, or set eval.every_steps to null",
        )
        require(
            self.optim.warmup_steps < self.train.total_steps,
            "optim.warmup_steps",
            f"{self.optim.warmup_steps} warm-up steps don't fit into a run of {self.train.total_steps}",
        )
        warmup, decay = self.optim.warmup_steps, self.optim.decay_steps or 0
        require(
            warmup + decay <= self.train.total_steps,
            "optim.decay_steps",
            f"{decay} steps after {warmup} of warm-up don't fit into a run of {self.train.total_steps}",
        )

        has_memory = any(isinstance(layer, InfiniConfig) for layer in self.model.layers)
        require(
            not self.eval.without_memory or has_memory,
            "eval.without_memory",
            "no layer has a compressive memory to leave out (kind infini); set it to false",
        )
        require(
            not self.train.write_cost or any(layer.chooses_writes for layer in self.model.layers),
            "train.write_cost",
            "no layer chooses how strongly it writes (update gated_delta); set it to 0",
        )
        require(
            self.train.local_dropout == 0 or has_memory,
            "train.local_dropout",
            "no layer has a compressive memory to read instead (kind infini); set it to 0",
        )
        require(
            not self.train.compile or self.parallel.zero_stage < 3,
            "train.compile",
            "with parallel.zero_stage 3 a layer's weights are there only while it computes; set it to false",
        )
        _check_what_is_trained(self)
        _check_model_layout(self)
        _check_batch_layout(self)
        _check_segment_lengths(self)

    @property
    def lanes_per_rank(self) -> int:
        """Lanes of one data-parallel rank."""
        return self.train.batch_lanes // (self.parallel.data_size or 1)

    @property
    def micro_lanes(self) -> int:
        """Lanes in one forward."""
        return self.train.micro_batch_lanes or self.lanes_per_rank

    @property
    def directory(self) -> Path:
        return Path(self.run_dir) if self.run_dir is not None else Path("runs") / self.name


def _check_what_is_trained(run: RunConfig) -> None:
    """A teacher has somebody to teach, and rules can be kept."""
    teacher, parallel, rules = run.train.teacher, run.parallel, run.optim.rules
    require(
        teacher is None or any(isinstance(layer, InfiniConfig) for layer in run.model.layers),
        "train.teacher",
        "no layer has a compressive memory that could learn from it (kind infini); set it to null",
    )
    require(
        teacher is None or (parallel.zero_stage < 3 and parallel.pipeline_size == 1),
        "train.teacher",
        "needs all layers and their whole weights on each rank: parallel.pipeline_size 1, zero_stage below 3",
    )
    require(
        parallel.zero_stage < 3 or all(rule.train for rule in rules),
        "optim.rules",
        "with parallel.zero_stage 3 all parameters are trained; choose a lower stage, or no train: false",
    )
    for rule in rules:
        require(
            rule.from_step < run.train.total_steps,
            "optim.rules",
            f"{rule.match}: from_step {rule.from_step} is not reached in a run of {run.train.total_steps} steps",
        )


def _check_model_layout(run: RunConfig) -> None:
    """Whether the model can be divided as `parallel` asks; whatever could not work is refused here, by name."""
    model, parallel = run.model, run.parallel
    tensor, pipeline = parallel.tensor_size, parallel.pipeline_size
    for name in ("num_heads", "ffn_size", "vocab_size"):
        value = getattr(model, name)
        lower, upper = value // tensor * tensor, -(-value // tensor) * tensor
        near = f"{lower} or {upper}" if lower and name != "vocab_size" else str(upper)
        require(
            value % tensor == 0,
            f"model.{name}",
            f"{value} can't be divided over parallel.tensor_size {tensor}; use {near}, or another tensor_size",
        )
    require(
        model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0,
        "model.num_kv_heads",
        f"{model.kv_heads} key-value heads and parallel.tensor_size {tensor}: one must be a multiple of the other",
    )
    stages = pipeline * parallel.virtual_stages
    require(
        model.num_layers >= stages,
        "parallel.pipeline_size",
        f"{stages} stages need at least as many layers, but model.num_layers is {model.num_layers}",
    )
    require(
        pipeline == 1 or not model.tied_embeddings,
        "model.tied_embeddings",
        "embedding and head lie on different stages with parallel.pipeline_size above 1; set it to false",
    )
    # Variants of the kind that the config names come first: their messages name what the user wrote.
    for attention in sorted(set(model.layers), key=lambda each: (each.kind != model.attention.kind, each.kind)):
        attention.check_layout(parallel)
    gated = {
        any(model.layers[layer].has_gates for layer in layers)
        for layers in divide_over_pipeline(model.num_layers, parallel)
    }
    require(
        len(gated) == 1,
        "parallel.pipeline_size",
        "only some pipeline ranks would hold layers with gates, so the ranks' optimizers would not match; use"
        " parallel.tensor_size or data_size instead, and pipeline_size 1",
    )


def _check_batch_layout(run: RunConfig) -> None:
    """The same for windows and lanes."""
    model, train, parallel = run.model, run.train, run.parallel
    tensor, pipeline, context = parallel.tensor_size, parallel.pipeline_size, parallel.context_size
    piece = (model.segment_tokens or 1) * context
    unit = "model.attention.segment_tokens" + (" x parallel.context_size" if context > 1 else "")
    for name, window in (("train.window_tokens", train.window_tokens), ("eval.window_tokens", run.eval.window_tokens)):
        if window is None:
            continue
        lower, upper = window // piece * piece, (window // piece + 1) * piece
        require(
            window % piece == 0,
            name,
            f"{window} is not a multiple of {unit} ({piece}); use {f'{lower} or {upper}' if lower else upper}",
        )
        require(
            not parallel.sequence_parallel or window // context % tensor == 0,
            name,
            f"{window // context} tokens a context-parallel rank can't be divided over parallel.tensor_size {tensor}"
            " (parallel.sequence_parallel is true)",
        )
    data = parallel.data_size or 1
    for name, lanes in (("train.batch_lanes", train.batch_lanes), ("eval.batch_lanes", run.eval.batch_lanes)):
        require(
            lanes is None or lanes % data == 0,
            name,
            f"{lanes} lanes can't be divided over {data} data-parallel ranks; use a multiple of {data}",
        )
    rounds = data * (pipeline if parallel.virtual_stages > 1 else 1)
    require(
        run.eval.batch_lanes is None or run.eval.batch_lanes % rounds == 0,
        "eval.batch_lanes",
        f"{run.eval.batch_lanes} lanes: with parallel.virtual_stages each data-parallel rank needs a multiple of"
        f" parallel.pipeline_size; use a multiple of {rounds}",
    )
    require(
        run.lanes_per_rank % run.micro_lanes == 0,
        "train.micro_batch_lanes",
        f"{run.lanes_per_rank} lanes{' of a data-parallel rank' if data > 1 else ''} can't be cut into micro-batches of"
        f" {run.micro_lanes}; choose a divisor",
    )
    micro_batches = run.lanes_per_rank // run.micro_lanes
    require(
        parallel.data_size is None or micro_batches <= MAX_MICRO_BATCHES,  # null: divided over processes later
        "train.micro_batch_lanes",
        f"{micro_batches} micro-batches in a step are more than {MAX_MICRO_BATCHES}; raise it, or lower"
        " train.batch_lanes",
    )
    require(
        parallel.virtual_stages == 1 or micro_batches % pipeline == 0,
        "train.micro_batch_lanes",
        f"parallel.virtual_stages needs micro-batches in multiples of parallel.pipeline_size ({pipeline}), but there"
        f" are {micro_batches}; change it or train.batch_lanes",
    )


def _check_segment_lengths(run: RunConfig) -> None:
    """Whether the lengths of `train.segment_tokens` can take the place of the model's."""
    field, context = "train.segment_tokens", run.parallel.context_size
    if not run.train.segment_tokens:
        return
    layers = dict.fromkeys(layer for layer in run.model.layers if layer.segment_tokens is not None)
    require(bool(layers), field, f"model.attention.kind {run.model.attention.kind} has no segments; leave it out")
    for attention in layers:
        require(
            attention.segments_may_vary,
            field,
            f"model.attention.kind {attention.kind} needs segments of one length; leave it out",
        )
    sizes = sorted({attention.segment_tokens for attention in layers if attention.segment_tokens})
    require(
        len(sizes) == 1,
        field,
        f"the layers' segments differ ({' and '.join(map(str, sizes))} tokens), and a step has one length for all; give"
        " all layers the same, or leave it out",
    )
    shard = run.train.window_tokens // context
    where = "train.window_tokens" + (" / parallel.context_size" if context > 1 else "")
    for length in run.train.segment_tokens:
        require(shard % length == 0, field, f"{length} does not divide {where} ({shard}); use divisors of {shard}")
        for attention in layers:
            try:
                dataclasses.replace(attention, segment_tokens=length)  # type: ignore[call-arg]
            except ConfigError as error:
                raise ConfigError(f"{field}: {length}: {error}") from error


def divide_processes(run: RunConfig, world_size: int) -> RunConfig:
    """The config with `parallel.data_size` filled in for this many processes.

    Raises:
        ConfigError: the processes can't be divided like that.
    """
    parallel = run.parallel
    needed = parallel.model_size * (parallel.data_size or 1)
    product = " x ".join(
        f"{name} {getattr(parallel, f'{name}_size')}"
        for name in ("tensor", "pipeline", "context", "data")
        if getattr(parallel, f"{name}_size") is not None
    )
    exact = parallel.data_size is not None
    require(
        world_size == needed if exact else world_size % needed == 0,
        "parallel",
        f"{product} needs {'' if exact else 'a multiple of '}{needed} processes, but {world_size}"
        f" {'was' if world_size == 1 else 'were'} started; start {needed} (--nproc {needed}) or change the sizes",
    )
    data = world_size // parallel.model_size
    return dataclasses.replace(run, parallel=dataclasses.replace(parallel, data_size=data))
