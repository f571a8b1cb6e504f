"""The table of layouts that the self-test runs, and the tiny run that each of them is.

A case differs from its reference in the layout alone: model, batches and optimizer are the same in one process.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from infini_train.config.attention import (
    AttentionConfig,
    FullConfig,
    InfiniConfig,
    LocalConfig,
    MemorizingConfig,
    MixedConfig,
    RmtConfig,
    TransformerXLConfig,
)
from infini_train.config.data import DataConfig
from infini_train.config.errors import ConfigError
from infini_train.config.model import ModelConfig
from infini_train.config.parallel import ParallelConfig
from infini_train.config.run import RunConfig
from infini_train.config.training import CheckpointConfig, OptimConfig, ParameterRule, TeacherConfig, TrainConfig

Precision = Literal["fp32", "bf16"]

STEPS = 5
LANES, MICRO_LANES = 8, 2  # of the batch, where the data-parallel ranks let it be so
SEGMENT_TOKENS, WINDOW_TOKENS = 8, 64
SEGMENT_LENGTHS = (8, 32, 16)  # drawn by varied cases; 32: a shard of two context-parallel ranks is a single segment
VOCABULARY = 96
ATTENTIONS: dict[str, AttentionConfig] = {
    "linear": InfiniConfig(segment_tokens=SEGMENT_TOKENS),
    "delta": InfiniConfig(segment_tokens=SEGMENT_TOKENS, update="delta"),
    "linear-overlap": InfiniConfig(segment_tokens=SEGMENT_TOKENS, overlap_tokens=3),
    "delta-overlap": InfiniConfig(segment_tokens=SEGMENT_TOKENS, update="delta", overlap_tokens=8),
    "delta-sharp": InfiniConfig(segment_tokens=SEGMENT_TOKENS, update="delta", features="sharp"),
    "delta-sinks": InfiniConfig(segment_tokens=SEGMENT_TOKENS, update="delta", overlap_tokens=3, sink_tokens=2),
    "linear-conv": InfiniConfig(segment_tokens=SEGMENT_TOKENS, conv_tokens=3),
    "delta-overlap-conv": InfiniConfig(
        segment_tokens=SEGMENT_TOKENS, update="delta", overlap_tokens=3, conv_tokens=2, conv_std=0.3
    ),
    "gated": InfiniConfig(segment_tokens=SEGMENT_TOKENS, update="gated_delta", read_norm=True),
    "gated-token": InfiniConfig(
        segment_tokens=SEGMENT_TOKENS,
        update="gated_delta",
        read="token",
        read_norm=True,
        maps=True,
        gate="query",
        overlap_tokens=3,
        conv_tokens=2,
        decay_init=3.0,  # fades fast enough to matter in a window
    ),
    "local": LocalConfig(segment_tokens=SEGMENT_TOKENS, overlap_tokens=3),
    "transformer_xl": TransformerXLConfig(segment_tokens=SEGMENT_TOKENS, cache_tokens=5),
    "memorizing": MemorizingConfig(segment_tokens=SEGMENT_TOKENS, cache_tokens=5, stored_tokens=20, top_k=3),
    "rmt": RmtConfig(segment_tokens=SEGMENT_TOKENS, memory_tokens=3),
    "full": FullConfig(),
    "mixed": MixedConfig(
        variants={
            "memory": InfiniConfig(segment_tokens=SEGMENT_TOKENS, update="delta", conv_tokens=2),
            "near": LocalConfig(segment_tokens=4, overlap_tokens=2),
            "whole": FullConfig(),
        },
        pattern=("memory", "near", "memory", "whole"),
    ),
}
# A large epsilon makes AdamW's step a smooth function of the gradient: with the usual one, a gradient of nearly zero
# moves its parameter by the whole learning rate, in a direction that rounding decides. The first step is not clipped,
# so that its gradients can be read from the first moments; some of the others are.
OPTIM = OptimConfig(lr=1e-2, gate_lr=5e-2, warmup_steps=2, eps=1e-2, clip_norm=1.2)
RULES = (  # of cases that are taught
    ParameterRule(match="layers.*.feed_forward.*", train=False),
    ParameterRule(match="layers.*.attention.*", lr=2e-2),
    ParameterRule(match="norm_final.*", from_step=1),
)
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Case:
    """A layout and what is trained in it.

    Attributes:
        parallel: with `data_size`.
        attention: a key of `ATTENTIONS`.
        layers: of the model.
        recompute: activation checkpointing of layers.
        tied: embedding and head share a matrix.
        varied: steps draw the length of their segments, and some drop the local attention, the first among them.
        taught: full attention with the same weights is the teacher, and some parameters stay as they are.
    """

    parallel: ParallelConfig
    attention: str
    precision: Precision = "fp32"
    layers: int = 4
    recompute: bool = False
    tied: bool = False
    varied: bool = False
    taught: bool = False

    @property
    def name(self) -> str:
        parts = [describe_layout(self.parallel), self.attention]
        parts += [f"{self.layers}layers"] * (self.layers != 4)
        parts += ["recompute"] * self.recompute + ["tied"] * self.tied + ["bf16"] * (self.precision == "bf16")
        parts += ["varied"] * self.varied + ["taught"] * self.taught
        return "-".join(parts)

    @property
    def processes(self) -> int:
        return self.parallel.model_size * (self.parallel.data_size or 1)


_PART = re.compile(r"(?P<way>tp|pp|v|cp|dp|zero)(?P<size>\d+)|(?P<flag>sp|offload|one)")
_FIELDS = {
    "tp": "tensor_size",
    "pp": "pipeline_size",
    "v": "virtual_stages",
    "cp": "context_size",
    "dp": "data_size",
    "zero": "zero_stage",
}


def parse_layout(text: str) -> ParallelConfig:
    """The layout of "tp2-sp-pp2-v2-cp2-dp2-zero1-offload"; what is left out is 1 or off."""
    fields: dict[str, int | bool] = {"data_size": 1}
    for part in text.split("-"):
        match = _PART.fullmatch(part)
        assert match, f"{part} in {text}"
        if match["way"]:
            fields[_FIELDS[match["way"]]] = int(match["size"])
        elif match["flag"] != "one":
            fields["sequence_parallel" if match["flag"] == "sp" else "offload_optimizer"] = True
    return ParallelConfig(timeout_s=TIMEOUT_S, **fields)  # type: ignore[arg-type]


def describe_layout(parallel: ParallelConfig) -> str:
    """The text that `parse_layout` reads; "one" for one process with all at its default."""
    parts = []
    for way, field in _FIELDS.items():
        size = getattr(parallel, field)
        if size > 1:
            parts.append(f"{way}{size}")
        if way == "tp" and parallel.sequence_parallel:
            parts.append("sp")
    return "-".join(parts + ["offload"] * parallel.offload_optimizer) or "one"


def _cases(layout: str, *attentions: str, **changes: object) -> Iterator[Case]:
    for attention in attentions:
        yield Case(parse_layout(layout), attention, **changes)  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    *_cases("zero2", "linear"),
    *_cases("zero3", "delta"),
    *_cases("offload", "linear"),
    *_cases("one", "delta-overlap", "delta-overlap-conv", recompute=True),
    *_cases("zero3", "linear", precision="bf16"),
    *_cases("one", "gated-token", recompute=True, layers=2),
    # 2 processes
    # two layers: what rounding does to keys and queries of unit length grows from layer to layer
    *_cases("tp2-sp", "gated", "gated-token", layers=2),
    *_cases("tp2-sp", "mixed", "delta-sinks"),
    *_cases("pp2", "mixed"),
    *_cases("cp2", "mixed", "full", "delta-sinks"),
    *_cases("dp2-zero3", "mixed"),
    *_cases("pp2", "gated-token", layers=2),
    *_cases("cp2", "gated", "gated-token", layers=2),
    *_cases("cp2", "gated-token", precision="bf16", layers=2),
    *_cases("dp2-zero3", "gated-token", layers=2),
    *_cases("tp2-sp", "gated-token", layers=2, varied=True),
    *_cases("pp2", "delta", varied=True),
    *_cases("cp2-zero3", "gated", layers=2, varied=True),
    *_cases("cp2", "delta-overlap-conv", layers=2, varied=True),
    *_cases("dp2-zero3", "linear-conv", layers=2, varied=True),
    *_cases("tp2-sp", "delta-overlap", taught=True),
    *_cases("cp2-zero2", "delta-overlap-conv", layers=2, taught=True),
    *_cases("dp2", "linear-conv", layers=2, taught=True),
    *_cases("tp2", "linear", "linear-conv", "local", "full"),
    *_cases("tp2", "rmt", layers=2),  # a window passes them once a segment: rounding adds up over all of its depth
    *_cases("tp2-sp", "linear", "delta", "transformer_xl", "memorizing"),
    *_cases("tp2-sp", "delta-overlap", "linear-conv", recompute=True),
    *_cases("tp2-sp", "linear", tied=True),
    *_cases("tp2-sp", "linear", precision="bf16"),
    *_cases("pp2", "linear", "delta", "full"),
    *_cases("pp2", "linear", recompute=True),
    *_cases("pp2", "delta", precision="bf16"),
    *_cases("pp2-v2", "linear", "delta-overlap"),
    *_cases("cp2", "linear", "delta", "linear-overlap", "delta-overlap", "linear-conv", "delta-overlap-conv", "local"),
    *_cases("cp2", "delta", "linear-conv", precision="bf16"),
    *_cases("dp2", "linear", "delta", "full"),
    *_cases("dp2-offload", "linear"),
    *_cases("dp2-zero2", "linear", "delta", "rmt"),
    *_cases("dp2-zero2-offload", "delta"),
    *_cases("dp2-zero3", "linear", "linear-conv", "delta", "transformer_xl", "memorizing", "rmt"),
    *_cases("dp2-zero3", "linear", recompute=True),
    *_cases("dp2-zero3", "linear", tied=True),
    *_cases("dp2-zero3", "linear", precision="bf16"),
    # 4 processes
    *_cases("tp4-sp", "gated-token", layers=2),
    *_cases("cp4", "mixed", "full", "delta-sinks"),
    *_cases("cp2-dp2-zero3", "mixed"),
    *_cases("cp4", "gated", "gated-token", layers=2),
    *_cases("tp2-sp-cp2", "gated-token", layers=2),
    *_cases("cp2-dp2-zero3", "gated-token", layers=2),
    *_cases("tp4-sp", "linear", "linear-conv", "delta"),  # more ranks than key-value heads
    *_cases("pp4", "linear", layers=5),
    *_cases("cp4", "linear", "delta", "delta-overlap"),
    *_cases("dp4-zero3", "linear"),
    *_cases("tp2-dp2-zero3", "linear"),
    *_cases("tp2-sp-cp2", "linear-conv", layers=2, taught=True),
    *_cases("tp2-sp-cp2", "linear", "delta"),
    *_cases("tp2-sp-cp2", "delta-sharp", layers=2),  # steep features magnify rounding from layer to layer
    *_cases("tp2-sp-cp2", "delta", precision="bf16"),
    *_cases("cp2-dp2-zero2", "linear", "delta"),
    *_cases("cp2-dp2-zero3", "linear", "delta"),
    *_cases("pp2-dp2", "linear"),
    *_cases("pp2-dp2-zero2", "delta"),
    *_cases("pp2-cp2", "linear", "delta-overlap"),
    *_cases("tp2-pp2", "linear"),
    *_cases("tp2-sp-pp2", "delta"),
    # 8 processes
    *_cases("tp2-sp-pp2-cp2", "gated-token", layers=2),
    *_cases("tp2-sp-pp2-cp2", "mixed"),
    *_cases("tp8-sp", "linear"),
    *_cases("cp8", "delta"),
    *_cases("dp8-zero3", "linear"),
    *_cases("tp2-sp-pp2-cp2", "linear", "delta", "delta-overlap-conv"),
    *_cases("tp2-pp2-v2-dp2", "linear"),
    *_cases("tp2-sp-cp2-dp2-zero2", "linear"),
    *_cases("tp2-cp2-dp2-zero3", "delta"),
    *_cases("pp2-cp2-dp2", "delta"),
    *_cases("tp2-sp-pp2-cp2", "delta", precision="bf16"),
)


def choose_cases(
    processes: int, patterns: Iterable[str] = (), precision: str | None = None, table: Iterable[Case] = CASES
) -> list[Case]:
    """The cases that use exactly this many processes, with more data-parallel ranks where they divide them.

    Raises:
        ConfigError: none is left.
    """
    patterns = tuple(patterns)
    fitted = dict.fromkeys(
        replace(case, parallel=replace(case.parallel, data_size=processes // case.parallel.model_size))
        for case in table
        if processes % case.processes == 0
    )
    chosen = [
        case
        for case in fitted
        if precision in (None, case.precision)
        and (not patterns or any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns))
    ]
    if not chosen:
        raise ConfigError(f"no case for {processes} processes has such a name")
    return chosen


def configure(case: Case, folder: Path) -> RunConfig:
    """The run of a case, in its own folder below `folder`."""
    data = case.parallel.data_size or 1
    lanes = LANES if LANES % data == 0 else data
    micro_lanes = max(1, min(MICRO_LANES, lanes // data // case.parallel.pipeline_size))
    model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=case.layers,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        value_head_dim=12,
        ffn_size=48,
        qk_norm=True,
        qkv_bias=True,
        tied_embeddings=case.tied,
        attention=ATTENTIONS[case.attention],
    )
    variation: dict[str, Any] = {}
    if case.varied:  # the share of steps without local attention is 1 in the first, whose gradients are compared
        variation = {"segment_tokens": SEGMENT_LENGTHS, "local_dropout": 1.0, "local_dropout_steps": STEPS}
    if case.taught:
        variation |= {"teacher": TeacherConfig(share=0.7)}
    train = TrainConfig(
        window_tokens=WINDOW_TOKENS,
        batch_lanes=lanes * (case.parallel.pipeline_size if lanes // data < case.parallel.pipeline_size else 1),
        micro_batch_lanes=micro_lanes,
        max_steps=STEPS,
        precision=case.precision,
        write_cost=2.0 if case.attention.startswith("gated") else 0.0,
        activation_checkpointing="layer" if case.recompute else "none",
        **variation,
    )
    return RunConfig(
        model=model,
        data=DataConfig(train="-"),  # the batches are made: batches.py
        train=train,
        parallel=case.parallel,
        optim=replace(OPTIM, rules=RULES) if case.taught else OPTIM,
        checkpoint=CheckpointConfig(keep_last=STEPS),
        run_dir=str(folder / case.name),
    )


def reference_of(config: RunConfig) -> RunConfig:
    """The same run in one process; cases that ask for the same one share it."""
    attention = next(name for name, value in ATTENTIONS.items() if value == config.model.attention)
    options = "-tied" * config.model.tied_embeddings + "-varied" * bool(config.train.segment_tokens)
    options += "-taught" * (config.train.teacher is not None)
    lanes = config.train.batch_lanes
    name = f"one-{attention}-{config.model.num_layers}layers{options}-{lanes}lanes-{config.train.precision}"
    micro_lanes = MICRO_LANES if lanes % MICRO_LANES == 0 else 1
    return dataclasses.replace(
        config,
        name=name,
        train=replace(config.train, micro_batch_lanes=micro_lanes, activation_checkpointing="none"),
        parallel=ParallelConfig(data_size=1),
        run_dir=str(config.directory.parent / "reference" / name),
    )
