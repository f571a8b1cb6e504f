"""Every dataclass of the run configuration: load, override, validate, dump. Imports no torch.

A run is one tree of plain YAML. `load_run` reads it (with an explicit ``include`` list, later wins), applies ``--set``
overrides, and validates the whole at one edge into frozen dataclasses. Each part of the program receives only its own
section. Sizes are in tokens, names carry their unit.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
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

    kind: Literal["infini"] = "infini"
    segment_tokens: int = 256
    update: Literal["linear", "delta"] = "linear"  # paper's Eq. 8 or Eq. 9
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

    kind: Literal["local"] = "local"
    segment_tokens: int = 256
    overlap_tokens: int = 0

    def __post_init__(self) -> None:
        _require(self.segment_tokens > 0, "model.attention.segment_tokens", "must be positive")
        _require(
            0 <= self.overlap_tokens <= self.segment_tokens,
            "model.attention.overlap_tokens",
            f"must lie between 0 and segment_tokens ({self.segment_tokens})",
        )


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Causal attention over the whole window; its cost grows with the square of the length."""

    kind: Literal["full"] = "full"


AttentionConfig = Annotated[InfiniConfig | LocalConfig | FullConfig, pydantic.Field(discriminator="kind")]
KINDS = {"infini": InfiniConfig, "local": LocalConfig, "full": FullConfig}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-shaped decoder. `num_kv_heads`, `head_dim` and `value_head_dim` have the usual defaults when null."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    num_kv_heads: int | None = None  # null: num_heads
    head_dim: int | None = None  # of queries and keys; null: hidden_size / num_heads
    value_head_dim: int | None = None  # null: head_dim
    attention: AttentionConfig = field(default_factory=InfiniConfig)
    rope_theta: FiniteFloat = 10_000.0
    norm_eps: FiniteFloat = 1e-5
    tied_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    init_std: FiniteFloat | None = None  # null: 1/sqrt(fan in), embeddings 0.02

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
class DataConfig:
    """Where the shards lie: folders written by `infini-data encode`, each with a manifest.json."""

    train: str
    validation: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Size and length of training. A lane is one row of the global batch; a step reads one window of every lane."""

    window_tokens: int  # tokens of a lane in one step; gradients flow through all its segments
    batch_lanes: int  # lanes of the global batch
    micro_batch_lanes: int | None = None  # lanes in one forward; null: all of them
    max_steps: int | None = None  # exactly one of max_steps and max_tokens
    max_tokens: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    carry_memory: bool = True  # the memory goes on from window to window (without gradient)
    activation_checkpointing: Literal["none", "layer"] = "none"
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
        _require(
            self.batch_lanes % self.micro_lanes == 0,
            "train.micro_batch_lanes",
            f"{self.batch_lanes} lanes can't be cut into micro-batches of {self.micro_lanes}; choose a divisor",
        )

    @property
    def micro_lanes(self) -> int:
        return self.batch_lanes if self.micro_batch_lanes is None else self.micro_batch_lanes

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
class OptimConfig:
    """AdamW. The gates have a learning rate of their own: at a common rate they hardly move (docs/architecture.md)."""

    lr: FiniteFloat = 3e-4
    gate_lr: FiniteFloat = 1e-2
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warmup, stable, decay
    warmup_steps: int = 100
    decay_steps: int | None = None  # wsd only; null: the last fifth
    min_lr_ratio: FiniteFloat = 0.1  # the schedule ends at this share of the learning rates
    weight_decay: FiniteFloat = 0.1  # matrices only; never norms, biases or gates
    beta1: FiniteFloat = 0.9
    beta2: FiniteFloat = 0.95
    eps: FiniteFloat = 1e-8
    clip_norm: FiniteFloat = 1.0

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
class EvalConfig:
    """Validation inside the training loop."""

    every_steps: int | None = None  # null: never
    max_tokens: int = 65_536  # of validation text a time
    batch_lanes: int | None = None  # null: those of one micro-batch
    window_tokens: int | None = None  # null: as in training

    def __post_init__(self) -> None:
        for name in ("every_steps", "batch_lanes", "window_tokens"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"eval.{name}", "must be positive, or null")
        _require(self.max_tokens > 0, "eval.max_tokens", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Console, metrics.jsonl and TensorBoard."""

    every_steps: int = 10
    memory_every_steps: int = 100  # gates and memory norms: scalars, heat map, histogram
    profile_steps: tuple[int, ...] = ()  # steps recorded by torch.profiler

    def __post_init__(self) -> None:
        for name in ("every_steps", "memory_every_steps"):
            _require(getattr(self, name) > 0, f"log.{name}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 500
    keep_last: int = 2
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
    name: str = "run"
    run_dir: str | None = None  # null: runs/<name>
    seed: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**31, "seed", "must lie between 0 and 2147483647")
        segment = self.model.segment_tokens
        for name, window in (
            ("train.window_tokens", self.train.window_tokens),
            ("eval.window_tokens", self.eval.window_tokens),
        ):
            if segment is not None and window is not None and window % segment:
                lower, upper = window // segment * segment, (window // segment + 1) * segment
                near = f"{lower} or {upper}" if lower else str(upper)
                problem = f"{window} is not a multiple of model.attention.segment_tokens ({segment})"
                raise ConfigError(f"{name}: {problem}; use {near}")
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

    @property
    def directory(self) -> Path:
        return Path(self.run_dir) if self.run_dir is not None else Path("runs") / self.name


# ------------------------------------------------------------------------------------------------- reading and writing


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 3e-4 as a number and 2026-01-31 as text, as people mean it."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"{key}: given twice (line {key_node.start_mark.line + 1}); keep one")
            seen.append(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the text that `_Loader` would read as a number."""


def _read_powers_of_ten(resolver: type[_Loader] | type[_Dumper]) -> None:
    """YAML 1.1 asks for a point and a signed exponent; without them PyYAML makes a string of 3e-4."""
    number = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$")
    resolver.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))


_read_powers_of_ten(_Loader)
_read_powers_of_ten(_Dumper)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _parse(text: str, source: str) -> Any:
    """The value of a YAML text; `source` (a file, an option) opens the message of an error."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    except (ValueError, RecursionError) as error:  # a number beyond all measure, brackets without end
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error


def config_roots() -> list[Path]:
    """Folders searched for configs by name: the checkout's configs/, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    return [root for root in (package.parent / "configs", package / "configs") if root.is_dir()]


def resolve(name: str, kind: str = "run") -> Path:
    """The file of a config given as a path or as a name below configs/<kind>/.

    Raises:
        ConfigError: no such file; the message lists the names there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"{name}: no such file")
    known: list[str] = []
    for root in config_roots():
        candidate = root / kind / f"{name}.yaml"
        if candidate.is_file():
            return candidate
        known += sorted(p.stem for p in (root / kind).glob("*.yaml"))
    raise ConfigError(f"{name}: no {kind} config of this name; {_nearest(name, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint: the known name that this one looks like, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(names) or 'none'}"


def read_tree(path: Path) -> dict[str, Any]:
    """The merged tree of a YAML file and of its ``include`` list (names relative to the file or to configs/)."""
    return _read_tree(path, ())


def _read_tree(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in including:
        raise ConfigError(f"{path}: includes itself; remove it from the include list of {including[-1].name}")
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections (model, data, train, ...)")
    included = tree.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}: include must be a list of files, as in include: [model/demo.yaml]")
    merged: dict[str, Any] = {}
    for name in included:
        candidates = [path.parent / name, *(root / name for root in config_roots())]
        found = next((c for c in candidates if c.is_file()), None)
        if found is None:
            raise ConfigError(f"{path}: include {name}: no such file beside it or below configs/")
        merged = _merge(merged, _read_tree(found, (*including, path.resolve())))
    return _merge(merged, tree)


def _merge(base: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Section by section. A mapping that names another ``kind`` keeps only the fields that both kinds have."""
    result = dict(base)
    for key, value in later.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            kind = value.get("kind", old.get("kind"))
            known = {f.name for f in dataclasses.fields(KINDS[kind])} if kind in KINDS else set()
            kept = old if kind == old.get("kind") else {name: v for name, v in old.items() if name in known}
            result[key] = _merge(kept, value)
        else:
            result[key] = value
    return result


def override(tree: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """The tree with ``a.b.c=value`` assignments applied; values are YAML."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {assignment}: write it as section.field=value")
        value = _parse(text, f"--set {assignment}")
        for key in reversed(keys):
            value = {key: value}
        tree = _merge(tree, value)
    return tree


def _section(location: Iterable[int | str]) -> Any:
    """The schema's dataclass at a pydantic location, where a variant's kind follows the field that holds it."""
    section: Any = RunConfig
    for part in location:
        if not dataclasses.is_dataclass(section):  # the union of variants
            section = KINDS.get(str(part))
        else:
            section = {f.name: f.type for f in dataclasses.fields(section)}.get(str(part))
    return section


def _explain(error: pydantic.ValidationError) -> str:
    """The first problem as one line: the key's path, what is wrong, the nearest valid name."""
    first = error.errors()[0]
    context, location = first.get("ctx", {}), first["loc"]
    if isinstance(context.get("error"), ConfigError):
        return str(context["error"])
    parts = [str(p) for i, p in enumerate(location) if location[:i] != ("model", "attention")]
    shown = ".".join(parts) or "config"
    if first["type"] == "union_tag_invalid":
        given = first["input"]["kind"]
        return f"{shown}.kind: unknown value {json.dumps(given)}; {_nearest(str(given), KINDS)}"
    if first["type"] == "union_tag_not_found":
        return f"{shown}.kind: is missing; give one of {', '.join(KINDS)}"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = [f.name for f in dataclasses.fields(_section(location[:-1]))]
        return f"{shown}: unknown key; {_nearest(str(location[-1]), names)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{shown}: is missing; give it a value"
    problem = first["msg"].replace("Input should be", "must be").replace("an object", "a mapping")
    return f"{shown}: {problem}, not {json.dumps(first['input'], default=str)[:80]}"


@functools.cache
def _validator() -> pydantic.TypeAdapter[RunConfig]:
    return pydantic.TypeAdapter(RunConfig)


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """The tree as frozen dataclasses.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible combination, in one line.
    """
    try:  # JSON mode, since strict Python mode refuses dict -> dataclass
        return _validator().validate_json(json.dumps(tree), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error)) from error
    except (TypeError, ValueError) as error:  # a YAML value that JSON doesn't know: a set, a list that holds itself
        raise ConfigError(f"config: {error}; write the value as text or number") from error


def load_run(name: str, assignments: Iterable[str] = ()) -> RunConfig:
    """The run config of this name or path, with overrides, validated."""
    return validate(override(read_tree(resolve(name)), assignments))


def load_model(name: str) -> ModelConfig:
    """The model config of this name or path (configs/model/)."""
    tree = read_tree(resolve(name, "model"))
    model = tree.get("model")
    attention = model.get("attention") if isinstance(model, dict) else None
    segment = attention.get("segment_tokens") if isinstance(attention, dict) else None
    window = segment if isinstance(segment, int) and segment > 0 else InfiniConfig().segment_tokens
    rest = {
        "data": {"train": "-"},
        "train": {"window_tokens": window, "batch_lanes": 1, "max_steps": 1},
        "optim": {"warmup_steps": 0},
    }
    return validate({**rest, **tree}).model


def to_tree(config: Any) -> dict[str, Any]:
    """A config dataclass as plain, JSON-ready values; `validate` of it gives the same config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; enough to run again."""
    return yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False)
