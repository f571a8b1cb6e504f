"""Every dataclass of the run configuration, with its defaults and checks. Imports no torch.

Each part of the program receives only its own section. Sizes are in tokens, names carry their unit. Files are read by
config_file.py.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import FiniteFloat


class ConfigError(ValueError):
    """A mistake of the user in a configuration; the message is one line that names the field and what to do."""


def _require(condition: bool, path: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{path}: {message}")


# ------------------------------------------------------------------------------------------------------------ schema


@dataclass(frozen=True, kw_only=True)
class InfiniConfig:
    """Segment-local attention plus a compressive memory (arXiv 2404.07143)."""

    kind: Literal["infini"] = "infini"  # chooses this attention
    segment_tokens: int = 256  # inside a segment attention is exact; what is older is read from the memory
    update: Literal["linear", "delta"] = "linear"  # how a segment is written: the paper's Eq. 8 or Eq. 9
    gate_init: FiniteFloat = 0.0  # beta at the start; sigmoid(beta) is the share of the memory
    overlap_tokens: int = 0  # local attention also sees the previous segment's last tokens (0: the paper's form)

    def __post_init__(self) -> None:
        _require(self.segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
        _require(
            0 <= self.overlap_tokens <= self.segment_tokens,
            "model.attention.overlap_tokens",
            f"must lie between 0 and segment_tokens ({self.segment_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Causal attention inside the segment only: Infini-attention without its memory."""

    kind: Literal["local"] = "local"  # chooses this attention
    segment_tokens: int = 256  # a token sees its own segment only
    overlap_tokens: int = 0  # and this many last tokens of the previous segment

    def __post_init__(self) -> None:
        _require(self.segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
        _require(
            0 <= self.overlap_tokens <= self.segment_tokens,
            "model.attention.overlap_tokens",
            f"must lie between 0 and segment_tokens ({self.segment_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """A baseline: attention inside the segment and to a cache of tokens before it, without gradient into the cache."""

    kind: Literal["transformer_xl"] = "transformer_xl"  # chooses this attention
    segment_tokens: int = 256  # a token sees its own segment
    cache_tokens: int = 256  # and this many last tokens of the previous segment

    def __post_init__(self) -> None:
        _require(self.segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
        _require(
            0 < self.cache_tokens <= self.segment_tokens,
            "model.attention.cache_tokens",
            f"must lie between 1 and segment_tokens ({self.segment_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Causal attention over the whole window; its cost grows with the square of the length."""

    kind: Literal["full"] = "full"  # chooses this attention


AttentionConfig = Annotated[
    InfiniConfig | LocalConfig | TransformerXLConfig | FullConfig, pydantic.Field(discriminator="kind")
]
KINDS = {"infini": InfiniConfig, "local": LocalConfig, "transformer_xl": TransformerXLConfig, "full": FullConfig}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-shaped decoder. `num_kv_heads`, `head_dim` and `value_head_dim` have the usual defaults when null."""

    vocab_size: int  # at least the tokenizer's ids
    hidden_size: int  # of a token's vector between the layers
    num_layers: int  # each of attention and feed-forward
    num_heads: int  # query heads of a layer; each has a gate with infini
    ffn_size: int  # inner size of the feed-forward (SwiGLU)
    num_kv_heads: int | None = None  # key-value heads, each with a memory; a divisor of num_heads; null: num_heads
    head_dim: int | None = None  # of queries and keys; null: hidden_size / num_heads
    value_head_dim: int | None = None  # of values; null: head_dim
    attention: AttentionConfig = field(default_factory=InfiniConfig)  # one variant for all layers
    rope_theta: FiniteFloat = 10_000.0  # base of the rotary embedding, which counts inside the segment
    norm_eps: FiniteFloat = 1e-5  # of the RMS norms
    tied_embeddings: bool = False  # one matrix embeds tokens and gives the logits
    qk_norm: bool = False  # RMS norm of queries and keys, a head each
    qkv_bias: bool = False  # biases in the query, key and value projections
    init_std: FiniteFloat | None = None  # of the initial matrices; null: 1/sqrt(fan in), embeddings 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size"):
            _require(getattr(self, name) > 0, f"model.{name}", "must be positive")
        for name in ("num_kv_heads", "head_dim", "value_head_dim"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"model.{name}", "must be positive, or null for its default")
        _require(
            self.num_heads % self.kv_heads == 0,
            "model.num_kv_heads",
            f"{self.kv_heads} key-value heads can't share {self.num_heads} query heads evenly; choose a divisor",
        )
        _require(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            "model.num_heads",
            f"{self.num_heads} heads don't divide hidden_size {self.hidden_size}; change one or set model.head_dim",
        )
        for name in ("rope_theta", "norm_eps"):
            _require(getattr(self, name) > 0, f"model.{name}", "must be positive")
        _require(self.init_std is None or self.init_std > 0, "model.init_std", "must be positive, or null")
        _require(self.key_dim % 2 == 0, "model.head_dim", f"rotary embedding needs an even size, not {self.key_dim}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def key_dim(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_dim(self) -> int:
        return self.key_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def segment_tokens(self) -> int | None:
        """Tokens a segment, or None for a variant without segments."""
        return None if isinstance(self.attention, FullConfig) else self.attention.segment_tokens


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig:
    """Texts with a number to remember, made while training; a text never crosses a window (docs/passkey.md).

    They begin short, grow as they are learned, and come under pressure when they have grown.
    """

    wording: str = "paper"  # of text and question
    varied_filler: bool = False  # sentences that no wording has, drawn anew for each text, in place of the wording's
    digits: int = 5  # of the number
    few_digits: bool = False  # numbers often consist of few different digits, so that a digit comes twice
    min_segments: int = 3  # of the shortest texts
    grow_below_loss: FiniteFloat = 0.12  # texts grow, up to a window, while the loss (nats, running mean) is below this
    text_weight: FiniteFloat = 1.0  # share in the loss of all text but the number
    answer_weight: FiniteFloat = 1.0  # of the answer
    key_weight: FiniteFloat = 0.5  # of the number's second mention
    pressure: FiniteFloat = 1.0  # texts feel up to so many windows long, by their write weights; 1: the paper's form
    pressure_share: FiniteFloat = 0.5  # of the texts that are put under pressure

    def __post_init__(self) -> None:
        for name in ("digits", "min_segments", "grow_below_loss"):
            _require(getattr(self, name) > 0, f"data.passkey.{name}", "must be positive")
        for name in ("text_weight", "answer_weight", "key_weight"):
            _require(getattr(self, name) >= 0, f"data.passkey.{name}", "must not be negative")
        _require(
            self.text_weight + self.answer_weight + self.key_weight > 0,
            "data.passkey.answer_weight",
            "some weight must be above 0",
        )
        _require(self.pressure >= 1, "data.passkey.pressure", "must be at least 1")
        _require(0 <= self.pressure_share <= 1, "data.passkey.pressure_share", "must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One of several datasets to train on, all encoded with the same tokenizer."""

    folder: str  # of its shards, or their URL
    weight: FiniteFloat = 1.0  # its share of the tokens, relative to the other parts' weights
    epochs: int | None = None  # at most so many passes; then the others share its place; null: no limit

    def __post_init__(self) -> None:
        _require(self.weight > 0, "data.mixture.weight", "must be positive; leave out what is not to be read")
        _require(self.epochs is None or self.epochs > 0, "data.mixture.epochs", "must be positive, or null")


@dataclass(frozen=True, kw_only=True)
class LengthStage:
    """Documents that come first, in the first epoch: a stage of a curriculum of lengths."""

    tokens: int  # length of the stage
    max_document_tokens: int  # longer documents come later

    def __post_init__(self) -> None:
        for name in ("tokens", "max_document_tokens"):
            _require(getattr(self, name) > 0, f"data.curriculum.{name}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read: shards written by `infini-data encode`, in folders or at URLs, or texts made while training."""

    train: str | None = None  # shards to train on; a relative path starts at the folder where the command runs
    mixture: tuple[MixturePart, ...] = ()  # several datasets to train on, instead of one
    curriculum: tuple[LengthStage, ...] = ()  # short documents first; each document still comes once an epoch
    passkey: PasskeyConfig | None = None  # texts to train on instead of shards
    validation: str | None = None  # held-out shards, for eval.every_steps and infini-train eval; null: none
    order_seed: int | None = None  # shuffles the documents; null: the run's seed
    cache_dir: str | None = None  # for URLs (s3://...): a folder of this machine with room for the shards
    max_corrupt_documents: int = 100  # damaged documents are left out and counted; more than these end the run

    def __post_init__(self) -> None:
        value = self.order_seed
        _require(value is None or 0 <= value < 2**31, "data.order_seed", "must lie between 0 and 2147483647, or null")
        given = [self.train is not None, bool(self.mixture), self.passkey is not None]
        _require(
            sum(given) == 1,
            "data.train",
            "give a folder of shards to train on (or data.mixture or data.passkey instead, one of them)",
        )
        _require(self.passkey is None or not self.curriculum, "data.curriculum", "data.passkey has lengths of its own")
        _require(self.max_corrupt_documents >= 0, "data.max_corrupt_documents", "must not be negative")
        for text in (self.train, self.validation, *(part.folder for part in self.mixture)):
            _require(
                not (text or "").startswith("pipe:"),
                "data.train",
                "a pipe can't be shuffled or resumed; give a folder, or a URL and data.cache_dir",
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Size and length of training. A lane is one row of the global batch; a step reads one window of every lane."""

    window_tokens: int  # tokens of a lane in one step; gradients flow through all its segments
    batch_lanes: int  # lanes of the global batch
    micro_batch_lanes: int | None = None  # lanes in one forward; null: all that a data-parallel rank has
    max_steps: int | None = None  # length of the run; give exactly one of max_steps and max_tokens
    max_tokens: int | None = None  # length of the run, padding included; rounded up to whole steps
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 keeps masters, moments and the memory in fp32
    carry_memory: bool = True  # the memory goes on from window to window (without gradient)
    activation_checkpointing: Literal["none", "layer"] = "none"  # layer: keep a layer's input, compute the rest again
    init_from: str | None = None  # a checkpoint folder: start anew from its weights only

    def __post_init__(self) -> None:
        for name in ("window_tokens", "batch_lanes"):
            _require(getattr(self, name) > 0, f"train.{name}", "must be positive")
        _require(
            (self.max_steps is None) != (self.max_tokens is None),
            "train.max_steps",
            "give exactly one of train.max_steps and train.max_tokens",
        )
        for name in ("max_steps", "max_tokens", "micro_batch_lanes"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"train.{name}", "must be positive, or null")

    @property
    def tokens_per_step(self) -> int:
        return self.window_tokens * self.batch_lanes

    @property
    def total_steps(self) -> int:
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return -(-self.max_tokens // self.tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is divided over processes: tensor x pipeline x context x data of them."""

    tensor_size: int = 1  # ranks that share every layer: heads, gates, memories, feed-forward, vocabulary
    sequence_parallel: bool = False  # norms and residuals divided along the sequence over the tensor-parallel ranks
    pipeline_size: int = 1  # stages of consecutive layers
    virtual_stages: int = 1  # stages on each pipeline rank (interleaved schedule)
    context_size: int = 1  # ranks that share every window, each a run of whole segments
    data_size: int | None = None  # ranks that share the lanes; null: all processes that are left
    zero_stage: Literal[1, 2, 3] = 1  # DeepSpeed ZeRO: 1 divides optimizer states, 2 also gradients, 3 also weights
    offload_optimizer: bool = False  # optimizer states and AdamW in host memory
    timeout_s: FiniteFloat = 600.0  # a rank that doesn't answer for this long ends the run

    def __post_init__(self) -> None:
        for name in ("tensor_size", "pipeline_size", "virtual_stages", "context_size", "data_size"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"parallel.{name}", "must be positive")
        _require(self.timeout_s > 0, "parallel.timeout_s", "must be positive")
        _require(
            not self.sequence_parallel or self.tensor_size > 1,
            "parallel.sequence_parallel",
            "divides the sequence over tensor-parallel ranks, but parallel.tensor_size is 1; raise it or set false",
        )
        _require(
            self.virtual_stages == 1 or self.pipeline_size > 1,
            "parallel.virtual_stages",
            "needs parallel.pipeline_size above 1",
        )
        _require(
            self.zero_stage < 3 or self.pipeline_size == 1,
            "parallel.zero_stage",
            "3 does not work with parallel.pipeline_size above 1 (DeepSpeed would hang); use stage 1 or 2",
        )

    @property
    def model_size(self) -> int:
        """Processes that hold one replica of the model and its window."""
        return self.tensor_size * self.pipeline_size * self.context_size


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The gates have a learning rate of their own: at a common rate they hardly move (docs/architecture.md)."""

    lr: FiniteFloat = 3e-4  # peak learning rate of all but the gates
    gate_lr: FiniteFloat = 1e-2  # peak learning rate of the gates
    schedule: Literal["cosine", "wsd"] = "cosine"  # how the rates fall; wsd: warm-up, stable, linear decay
    warmup_steps: int = 100  # the rates rise linearly to their peak
    decay_steps: int | None = None  # of the decay, wsd only; null: the last fifth
    min_lr_ratio: FiniteFloat = 0.1  # the schedule ends at this share of the learning rates
    weight_decay: FiniteFloat = 0.1  # matrices only; never norms, biases or gates
    beta1: FiniteFloat = 0.9  # of the first moment
    beta2: FiniteFloat = 0.95  # of the second moment
    eps: FiniteFloat = 1e-8  # added to the root of the second moment
    clip_norm: FiniteFloat = 1.0  # the global gradient norm is cut to it

    def __post_init__(self) -> None:
        for name in ("lr", "gate_lr", "eps", "clip_norm"):
            _require(getattr(self, name) > 0, f"optim.{name}", "must be positive")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", "must lie in [0, 1)")
        for name in ("warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, f"optim.{name}", "must not be negative")
        _require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", "must lie between 0 and 1")
        _require(
            self.decay_steps is None or self.schedule == "wsd", "optim.decay_steps", "is used by schedule: wsd only"
        )
        _require(self.decay_steps is None or self.decay_steps > 0, "optim.decay_steps", "must be positive")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Steps that nothing is learned from: the loss or a gradient is no number, or the loss jumps."""

    max_skips: int = 10  # so many steps in a row may be left out; one more ends the run
    spikes: Literal["warn", "skip", "rollback"] = "warn"  # skip the step, or go back to the last checkpoint as well
    spike_window_steps: int = 100  # a loss is compared with those of this many steps before it
    spike_deviations: FiniteFloat = 6.0  # it is a spike at so many standard deviations above their mean

    def __post_init__(self) -> None:
        _require(self.max_skips >= 0, "guard.max_skips", "must not be negative")
        _require(self.spike_window_steps > 1, "guard.spike_window_steps", "must be at least 2")
        _require(self.spike_deviations > 0, "guard.spike_deviations", "must be positive")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation inside the training loop."""

    every_steps: int | None = None  # steps from one validation to the next; null: never
    max_tokens: int = 65_536  # of validation text each time
    batch_lanes: int | None = None  # documents side by side; null: those of one micro-batch
    window_tokens: int | None = None  # tokens of a lane in one forward; null: as in training

    def __post_init__(self) -> None:
        for name in ("every_steps", "batch_lanes", "window_tokens"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"eval.{name}", "must be positive, or null")
        _require(self.max_tokens > 0, "eval.max_tokens", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Console, metrics.jsonl and TensorBoard."""

    every_steps: int = 10  # steps from one console line and row of metrics to the next
    memory_every_steps: int = 100  # the same for gates and memory norms: scalars, heat map, histogram
    profile_steps: tuple[int, ...] = ()  # steps recorded by torch.profiler

    def __post_init__(self) -> None:
        for name in ("every_steps", "memory_every_steps"):
            _require(getattr(self, name) > 0, f"log.{name}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 500  # steps from one checkpoint to the next; the last step is always saved
    keep_last: int = 2  # this many of the newest stay, older ones are deleted
    milestone_every_steps: int | None = None  # checkpoints at these steps are never deleted

    def __post_init__(self) -> None:
        _require(self.every_steps > 0, "checkpoint.every_steps", "must be positive")
        _require(self.keep_last >= 1, "checkpoint.keep_last", "must be at least 1")
        value = self.milestone_every_steps
        _require(value is None or value > 0, "checkpoint.milestone_every_steps", "must be positive, or null")

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs to this step."""
        return step % self.every_steps == 0 or (
            self.milestone_every_steps is not None and step % self.milestone_every_steps == 0
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    name: str = "run"  # names the run's folder
    run_dir: str | None = None  # all that the run writes; null: runs/ and the name
    seed: int = 0  # of the initial weights and the order of documents
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**31, "seed", "must lie between 0 and 2147483647")
        _require(
            self.eval.every_steps is None or self.data.validation is not None,
            "data.validation",
            "is needed because eval.every_steps is set; give a folder of shards, or set eval.every_steps to null",
        )
        _require(
            self.optim.warmup_steps < self.train.total_steps,
            "optim.warmup_steps",
            f"{self.optim.warmup_steps} warm-up steps don't fit into a run of {self.train.total_steps}",
        )
        warmup, decay = self.optim.warmup_steps, self.optim.decay_steps or 0
        _require(
            warmup + decay <= self.train.total_steps,
            "optim.decay_steps",
            f"{decay} steps after {warmup} of warm-up don't fit into a run of {self.train.total_steps}",
        )

        _check_model_layout(self)
        _check_batch_layout(self)

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


def _check_model_layout(run: RunConfig) -> None:
    """Whether the model can be divided as `parallel` asks; whatever could not work is refused here, by name."""
    model, parallel = run.model, run.parallel
    tensor, pipeline, context = parallel.tensor_size, parallel.pipeline_size, parallel.context_size
    for name in ("num_heads", "ffn_size", "vocab_size"):
        value = getattr(model, name)
        lower, upper = value // tensor * tensor, -(-value // tensor) * tensor
        near = f"{lower} or {upper}" if lower and name != "vocab_size" else str(upper)
        _require(
            value % tensor == 0,
            f"model.{name}",
            f"{value} can't be divided over parallel.tensor_size {tensor}; use {near}, or another tensor_size",
        )
    _require(
        model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0,
        "model.num_kv_heads",
        f"{model.kv_heads} key-value heads and parallel.tensor_size {tensor}: one must be a multiple of the other",
    )
    stages = pipeline * parallel.virtual_stages
    _require(
        model.num_layers >= stages,
        "parallel.pipeline_size",
        f"{stages} stages need at least as many layers, but model.num_layers is {model.num_layers}",
    )
    _require(
        pipeline == 1 or not model.tied_embeddings,
        "model.tied_embeddings",
        "embedding and head lie on different stages with parallel.pipeline_size above 1; set it to false",
    )
    _require(
        context == 1 or model.segment_tokens is not None,
        "parallel.context_size",
        "model.attention.kind full has no segments to divide over ranks; use infini or local, or context_size 1",
    )
    _require(
        context == 1 or not isinstance(model.attention, TransformerXLConfig),
        "parallel.context_size",
        "the cache of model.attention.kind transformer_xl does not cross ranks; use infini or local, or context_size 1",
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
        _require(
            window % piece == 0,
            name,
            f"{window} is not a multiple of {unit} ({piece}); use {f'{lower} or {upper}' if lower else upper}",
        )
        _require(
            not parallel.sequence_parallel or window // context % tensor == 0,
            name,
            f"{window // context} tokens a context-parallel rank can't be divided over parallel.tensor_size {tensor}"
            " (parallel.sequence_parallel is true)",
        )
    data = parallel.data_size or 1
    for name, lanes in (("train.batch_lanes", train.batch_lanes), ("eval.batch_lanes", run.eval.batch_lanes)):
        _require(
            lanes is None or lanes % data == 0,
            name,
            f"{lanes} lanes can't be divided over {data} data-parallel ranks; use a multiple of {data}",
        )
    rounds = data * (pipeline if parallel.virtual_stages > 1 else 1)
    _require(
        run.eval.batch_lanes is None or run.eval.batch_lanes % rounds == 0,
        "eval.batch_lanes",
        f"{run.eval.batch_lanes} lanes: with parallel.virtual_stages each data-parallel rank needs a multiple of"
        f" parallel.pipeline_size; use a multiple of {rounds}",
    )
    _require(
        run.lanes_per_rank % run.micro_lanes == 0,
        "train.micro_batch_lanes",
        f"{run.lanes_per_rank} lanes{' of a data-parallel rank' if data > 1 else ''} can't be cut into micro-batches of"
        f" {run.micro_lanes}; choose a divisor",
    )
    micro_batches = run.lanes_per_rank // run.micro_lanes
    _require(
        parallel.virtual_stages == 1 or micro_batches % pipeline == 0,
        "train.micro_batch_lanes",
        f"parallel.virtual_stages needs micro-batches in multiples of parallel.pipeline_size ({pipeline}), but there"
        f" are {micro_batches}; change it or train.batch_lanes",
    )


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
    _require(
        world_size == needed if exact else world_size % needed == 0,
        "parallel",
        f"{product} needs {'' if exact else 'a multiple of '}{needed} processes, but {world_size}"
        f" {'was' if world_size == 1 else 'were'} started; start {needed} (--nproc {needed}) or change the sizes",
    )
    data = world_size // parallel.model_size
    return dataclasses.replace(run, parallel=dataclasses.replace(parallel, data_size=data))
