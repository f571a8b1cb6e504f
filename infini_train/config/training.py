"""How a run goes: `train`, `optim`, `guard`, `eval`, `log` and `checkpoint`."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from infini_train.config.errors import require
from infini_train.config.values import Epsilon, FilePath, Lanes, Many, Norm, Rate, Step, Tokens, Total


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model as its own teacher: the same weights with full attention over the window and no memory.

    What the teacher says of each next token is part of the loss, so that the memory learns to bring back what full
    attention would have seen. It means most where the weights that both share stay as they are (optim.rules).
    """

    share: Rate = 1.0  # of KL(teacher || model) in the loss; the rest is that of the text

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "train.teacher.share", "must lie above 0 and be at most 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Size and length of training. A lane is a row of the global batch; each step reads one window of every lane."""

    window_tokens: Tokens  # sequence length: tokens of a lane in one step; gradients flow through all its segments
    batch_lanes: Lanes  # lanes (sequences) in the global batch
    micro_batch_lanes: Lanes | None = None  # lanes in a micro-batch; null: all lanes of a data-parallel rank
    max_steps: Total | None = None  # length of the run; give exactly one of max_steps and max_tokens
    max_tokens: Total | None = None  # length of the run, padding included; rounded up to whole steps
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 keeps master weights, moments and the memory in fp32
    carry_memory: bool = True  # carry the memory from window to window (without gradient)
    # segment lengths: each step draws one of them, for all layers; evaluation keeps model.attention.segment_tokens;
    # empty: so does training
    segment_tokens: tuple[Tokens, ...] = ()
    # share of the first steps in which layers with a memory drop their local attention; falls linearly to 0
    local_dropout: Rate = 0.0
    local_dropout_steps: Total = 1000  # steps until that share is 0
    # what writing to a gated delta memory costs: this times the mean of softplus(x), the strengths' logits, over tokens
    # (padding too), layers with such a memory and heads is added to the loss that is minimised, not to the one reported
    write_cost: Norm = 0.0
    write_cost_steps: Total = 1000  # steps in which it rises to that, linearly from 0
    teacher: TeacherConfig | None = None  # learn from the same weights with full attention; null: from the text alone
    activation_checkpointing: Literal["none", "layer"] = "none"  # layer: keep each layer's input, recompute the rest
    # compile each layer with torch.compile; on a CPU the gain is too small for most runs (docs/training.md)
    compile: bool = False
    init_from: FilePath | None = None  # a checkpoint folder: start a new run from its weights

    def __post_init__(self) -> None:
        for name in ("window_tokens", "batch_lanes"):
            require(getattr(self, name) > 0, f"train.{name}", "must be positive")
        require(self.write_cost >= 0, "train.write_cost", "must not be negative")
        require(self.write_cost_steps > 0, "train.write_cost_steps", "must be positive")
        require(
            (self.max_steps is None) != (self.max_tokens is None),
            "train.max_steps",
            "give exactly one of train.max_steps and train.max_tokens",
        )
        for name in ("max_steps", "max_tokens", "micro_batch_lanes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}", "must be positive, or null")
        for length in self.segment_tokens:
            require(length > 0, "train.segment_tokens", f"{length}: each length must be positive")
        require(0 <= self.local_dropout <= 1, "train.local_dropout", "must lie between 0 and 1")
        require(self.local_dropout_steps > 0, "train.local_dropout_steps", "must be positive")

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
class ParameterRule:
    """How some parameters are trained; the first rule that a parameter's name matches holds for it."""

    match: str  # names of parameters; * is any part of a name, as in layers.*.attention.*
    train: bool = True  # false: they stay as they are
    lr: Rate | None = None  # peak learning rate; null: optim.lr, for gates optim.gate_lr
    from_step: Step = 0  # step from which on they are trained; before it they stay as they are

    def __post_init__(self) -> None:
        require(bool(self.match), "optim.rules.match", "must not be empty; * matches every name")
        require(self.lr is None or self.lr > 0, "optim.rules.lr", "must be positive, or null")
        require(self.from_step >= 0, "optim.rules.from_step", "must not be negative")
        for name, none in (("lr", None), ("from_step", 0)):
            is_set = getattr(self, name) != none
            require(self.train or not is_set, f"optim.rules.{name}", "has no meaning where train is false")

    def holds_for(self, name: str) -> bool:
        """Whether it is about the parameter with this name."""
        return fnmatchcase(name, self.match)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The gates have their own learning rate: at the common one they hardly move (docs/architecture.md)."""

    lr: Rate = 3e-4  # peak learning rate of everything but the gates
    gate_lr: Rate = 1e-2  # peak learning rate of the gates
    schedule: Literal["cosine", "wsd"] = "cosine"  # learning-rate schedule; wsd: warm-up, stable, linear decay
    warmup_steps: Total = 100  # linear warm-up to the peak
    decay_steps: Total | None = None  # length of the decay, wsd only; null: the last fifth of the run
    min_lr_ratio: Rate = 0.1  # final learning rate as a fraction of the peak
    weight_decay: Rate = 0.1  # weight decay of matrices; norms, biases and gates have none
    beta1: Rate = 0.9  # decay rate of the first moment
    beta2: Rate = 0.95  # decay rate of the second moment
    eps: Epsilon = 1e-8  # epsilon, added to the square root of the second moment
    clip_norm: Norm = 1.0  # gradients are clipped to this global norm
    # parameters that stay as they are, or have a rate or a first step of their own
    rules: tuple[ParameterRule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("lr", "gate_lr", "eps", "clip_norm"):
            require(getattr(self, name) > 0, f"optim.{name}", "must be positive")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", "must lie in [0, 1)")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"optim.{name}", "must not be negative")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", "must lie between 0 and 1")
        require(
            self.decay_steps is None or self.schedule == "wsd", "optim.decay_steps", "is used by schedule: wsd only"
        )
        require(self.decay_steps is None or self.decay_steps > 0, "optim.decay_steps", "must be positive")

    def trains(self, name: str) -> bool:
        """Whether the parameter with this name is trained, if only from some step on."""
        number = self.rule_of(name)
        return number is None or self.rules[number].train

    def rule_of(self, name: str) -> int | None:
        """Number of the rule that holds for the parameter with this name; None: no rule does."""
        return next((number for number, rule in enumerate(self.rules) if rule.holds_for(name)), None)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Anomaly detection: steps with a non-finite loss or gradient, or a loss spike."""

    max_skips: Total = 10  # maximum number of consecutive steps left out; one more ends the run
    # on a loss spike: ignore: do nothing; warn: report it; skip: report it and leave the step out; rollback: also
    # return to the newest checkpoint's weights, and continue after the data read since
    spikes: Literal["ignore", "warn", "skip", "rollback"] = "warn"
    spike_window_steps: Many = 100  # a step's loss is compared with the losses of this many preceding steps
    spike_deviations: Norm = 6.0  # a loss this many standard deviations above their mean is a spike

    def __post_init__(self) -> None:
        require(self.max_skips >= 0, "guard.max_skips", "must not be negative")
        require(self.spike_window_steps > 1, "guard.spike_window_steps", "must be at least 2")
        require(self.spike_deviations > 0, "guard.spike_deviations", "must be positive")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation inside the training loop."""

    every_steps: Total | None = None  # steps between validations; null: never
    max_tokens: Total = 65_536  # maximum number of tokens per validation
    batch_lanes: Lanes | None = None  # documents read side by side; null: as many as lanes in a micro-batch
    window_tokens: Tokens | None = None  # sequence length in validation; null: as in training
    without_memory: bool = False  # also measure the same text with nothing read from the memory; takes as long again

    def __post_init__(self) -> None:
        for name in ("every_steps", "batch_lanes", "window_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, f"eval.{name}", "must be positive, or null")
        require(self.max_tokens > 0, "eval.max_tokens", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Console, metrics.jsonl and TensorBoard."""

    every_steps: Total = 10  # steps between console lines and rows of metrics
    memory_every_steps: Total = 100  # steps between records of gates and memory norms
    profile_steps: tuple[Step, ...] = ()  # steps to record with torch.profiler

    def __post_init__(self) -> None:
        for name in ("every_steps", "memory_every_steps"):
            require(getattr(self, name) > 0, f"log.{name}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep."""

    every_steps: Total = 500  # steps between checkpoints; the last step is always saved
    keep_last: Total = 2  # this many of the newest are kept, older ones are deleted
    milestone_every_steps: Total | None = None  # checkpoints at these steps are never deleted

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "checkpoint.every_steps", "must be positive")
        require(self.keep_last >= 1, "checkpoint.keep_last", "must be at least 1")
        value = self.milestone_every_steps
        require(value is None or value > 0, "checkpoint.milestone_every_steps", "must be positive, or null")

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs to this step."""
        return step % self.every_steps == 0 or (
            self.milestone_every_steps is not None and step % self.milestone_every_steps == 0
        )
