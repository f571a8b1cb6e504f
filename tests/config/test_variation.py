"""Which models may train with segments of several lengths, and without local attention in some steps."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from infini_train.config.attention import KINDS, LocalConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, validate
from infini_train.config.variant import AttentionVariant
from tests.config.test_baselines import ATTENTIONS, tree

MIXED = "{kind: mixed, variants: {memory: {kind: infini, segment_tokens: 32%s}, other: %s}, pattern: [memory, other]}"


def test_both_are_off_by_default(base: Path) -> None:
    train = load_run(str(base)).train
    assert (train.segment_tokens, train.local_dropout) == ((), 0.0)


@pytest.mark.parametrize(
    "attention",
    [
        "{kind: infini, segment_tokens: 32, overlap_tokens: 16, conv_tokens: 4}",
        "{kind: local, segment_tokens: 32}",
        MIXED % ("", "{kind: full}"),
        MIXED % ("", "{kind: local, segment_tokens: 32, overlap_tokens: 16}"),
    ],
)
def test_lengths_that_fit(base: Path, attention: str) -> None:
    config = load_run(str(base), [f"model.attention={attention}", "train.segment_tokens=[16, 128, 16]"])
    assert config.train.segment_tokens == (16, 128, 16)
    assert config.model.segment_tokens == 32


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_baselines_fit_any_length_that_holds_their_cache(kind: str) -> None:
    train = {"window_tokens": 32, "batch_lanes": 2, "max_steps": 30, "segment_tokens": [8, 16]}
    assert validate(tree(ATTENTIONS[kind], train=train)).train.segment_tokens == (8, 16)
    if kind == "transformer_xl":
        with pytest.raises(ConfigError, match=r"^train.segment_tokens: 4: model.attention.cache_tokens: must lie"):
            validate(tree(ATTENTIONS[kind], train={**train, "segment_tokens": [8, 4]}))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            "{kind: infini, segment_tokens: 32, overlap_tokens: 20}",
            "16: model.attention.overlap_tokens: must lie between 0 and segment_tokens (16)",
        ),
        (
            "{kind: infini, segment_tokens: 32, conv_tokens: 17}",
            "16: model.attention.conv_tokens: must lie between 0 and segment_tokens (16)",
        ),
        (
            MIXED % (", overlap_tokens: 8", "{kind: local, segment_tokens: 32, overlap_tokens: 20}"),
            "16: model.attention.overlap_tokens: must lie between 0 and segment_tokens (16)",
        ),
        (
            MIXED % ("", "{kind: local, segment_tokens: 16}"),
            "the layers' segments differ (16 and 32 tokens), and a step has one length for all; give all layers the"
            " same, or leave it out",
        ),
        ("{kind: full}", "model.attention.kind full has no segments; leave it out"),
    ],
)
def test_lengths_that_do_not_fit(base: Path, attention: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(str(base), [f"model.attention={attention}", "train.segment_tokens=[32, 16]"])
    assert str(caught.value) == f"train.segment_tokens: {message}"


def test_lengths_divide_the_shard_of_a_context_parallel_rank(base: Path) -> None:
    assert load_run(str(base), ["train.segment_tokens=[64]", "parallel.context_size=2"])
    with pytest.raises(ConfigError) as caught:
        load_run(str(base), ["train.segment_tokens=[64]", "parallel.context_size=4"])
    assert str(caught.value) == (
        "train.segment_tokens: 64 does not divide train.window_tokens / parallel.context_size (32); use divisors of 32"
    )


@dataclass(frozen=True, kw_only=True)
class RigidConfig(AttentionVariant):
    """Its state has a place for each token of a segment."""

    kind: Literal["rigid"] = "rigid"
    segment_tokens: int = 32
    seen_tokens: ClassVar[int] = 0


def test_a_variant_that_does_not_say_that_it_fits_any_length_is_refused(base: Path) -> None:
    config = load_run(str(base), ["train.segment_tokens=[16]"])
    with pytest.raises(ConfigError, match=r"^train.segment_tokens: model.attention.kind rigid needs segments of one"):
        replace(config, model=replace(config.model, attention=RigidConfig()))
    replace(config, model=replace(config.model, attention=LocalConfig(segment_tokens=32)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("infini", "mixed")])
def test_local_attention_is_dropped_for_a_memory_only(base: Path, kind: str) -> None:
    fields = {each: f"{{kind: {each}}}" for each in KINDS}
    fields |= {
        each: f"{{kind: {each}, segment_tokens: 32, cache_tokens: 32}}" for each in ("transformer_xl", "memorizing")
    }
    settings = ["train.local_dropout=0.3", f"model.attention={fields[kind]}"]
    with pytest.raises(ConfigError) as caught:
        load_run(str(base), settings)
    message = "no layer has a compressive memory to read instead (kind infini); set it to 0"
    assert str(caught.value) == f"train.local_dropout: {message}"
    mixed = MIXED % ("", "{kind: full}")
    assert load_run(str(base), [f"model.attention={mixed}", "train.local_dropout=0.3"]).train.local_dropout == 0.3
