"""What the baselines refuse, by the field that asks for it."""

import pytest

from infini_train.config.attention import MemorizingConfig, RmtConfig, TransformerXLConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import validate

MODEL = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48}
ATTENTIONS = {
    "transformer_xl": {"kind": "transformer_xl", "segment_tokens": 8, "cache_tokens": 8},
    "memorizing": {"kind": "memorizing", "segment_tokens": 8, "cache_tokens": 0, "stored_tokens": 64, "top_k": 4},
    "rmt": {"kind": "rmt", "segment_tokens": 8, "memory_tokens": 2},
}


def tree(attention: dict[str, object], **sections: object) -> dict[str, object]:
    return {
        "model": {**MODEL, "attention": attention},
        "data": {"train": "x"},
        "train": {"window_tokens": 32, "batch_lanes": 2, "max_steps": 30},
        "optim": {"warmup_steps": 2},
        **sections,
    }


def test_they_are_read() -> None:
    found = [validate(tree(attention)).model.attention for attention in ATTENTIONS.values()]
    assert found == [
        TransformerXLConfig(segment_tokens=8, cache_tokens=8),
        MemorizingConfig(segment_tokens=8, cache_tokens=0, stored_tokens=64, top_k=4),
        RmtConfig(segment_tokens=8, memory_tokens=2),
    ]


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_context_parallelism_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"^parallel.context_size: .* of model.attention.kind {kind} does not cross"):
        validate(tree(ATTENTIONS[kind], parallel={"context_size": 2}))


@pytest.mark.parametrize(
    ("parallel", "field"),
    [
        ({"pipeline_size": 2}, "pipeline_size"),
        ({"tensor_size": 2, "sequence_parallel": True}, "sequence_parallel"),
    ],
    ids=str,
)
def test_what_the_stack_of_rmt_cannot_be_divided_over(parallel: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^parallel.{field}: .* of model.attention.kind rmt"):
        validate(tree(ATTENTIONS["rmt"], parallel=parallel))
    assert validate(tree(ATTENTIONS["transformer_xl"], parallel=parallel))


def test_memorizing_has_no_pipeline_stages() -> None:
    """DeepSpeed adds up the norm a parameter group at a time, and one stage alone would have a group of gates."""
    with pytest.raises(ConfigError, match=r"^parallel.pipeline_size: the gates of model.attention.kind memorizing"):
        validate(tree(ATTENTIONS["memorizing"], parallel={"pipeline_size": 2}))
    assert validate(tree(ATTENTIONS["memorizing"], parallel={"tensor_size": 2, "sequence_parallel": True}))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("memorizing", {"top_k": 65}, "model.attention.top_k: can't be more than stored_tokens (64)"),
        ("memorizing", {"cache_tokens": 9}, "model.attention.cache_tokens: must lie between 0 and segment_tokens (8)"),
        ("memorizing", {"layer": 2}, "model.attention.layer: 2 is none of the 2 layers; choose one from 0 to 1"),
        ("memorizing", {"stored_tokens": 0}, "model.attention.stored_tokens: must be positive"),
        ("rmt", {"memory_tokens": 0}, "model.attention.memory_tokens: must be positive"),
    ],
)
def test_impossible_sizes_are_refused(kind: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(tree({**ATTENTIONS[kind], **changes}))
    assert str(caught.value) == message


def test_a_memory_that_is_not_there_is_not_measured() -> None:
    tree = {
        "model": {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 32},
        "data": {"train": "a"},
        "train": {"window_tokens": 512, "batch_lanes": 4, "max_steps": 1000},
        "eval": {"without_memory": True},
    }
    validate(tree)
    with pytest.raises(ConfigError, match="^eval.without_memory: no layer has a compressive memory"):
        validate({**tree, "model": {**tree["model"], "attention": {"kind": "memorizing"}}})


def test_writing_costs_something_only_where_tokens_choose_how_they_write() -> None:
    tree = {
        "model": {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 32},
        "data": {"train": "a"},
        "train": {"window_tokens": 512, "batch_lanes": 4, "max_steps": 1000, "write_cost": 0.1},
    }
    validate({**tree, "model": {**tree["model"], "attention": {"kind": "infini", "update": "gated_delta"}}})
    with pytest.raises(ConfigError, match="^train.write_cost: no layer chooses how strongly it writes"):
        validate(tree)
    with pytest.raises(ConfigError, match="^train.write_cost: must not be negative"):
        validate({**tree, "train": {**tree["train"], "write_cost": -1.0}})
