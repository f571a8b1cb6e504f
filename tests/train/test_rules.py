"""optim.rules: what is not trained stays as it is, has no states, and is saved; what sleeps begins at its step."""

import json

import pytest
import torch

from infini_train.checkpoint import store
from infini_train.config.errors import ConfigError
from infini_train.config.training import OptimConfig, ParameterRule
from infini_train.model.transformer import Transformer
from infini_train.train.freezing import check_rules
from infini_train.train.loop import train
from infini_train.train.memory_need import least_bytes
from infini_train.train.opening import open_session
from infini_train.train.optim import learning_rates, parameter_groups
from tests.train.conftest import assert_same, capture, drive
from tests.train.test_step import save

FEED_FORWARD = "layers.*.feed_forward.*"
FROZEN = f"optim.rules=[{{match: '{FEED_FORWARD}', train: false}}, {{match: 'embedding.*', train: false}}]"
SLEEPING = f"optim.rules=[{{match: '{FEED_FORWARD}', from_step: 3, lr: 2e-3}}]"


def weights(session, match=""):
    return {
        name: value.detach().clone()
        for name, value in session.stages.transformers()[0].named_parameters()
        if match in name
    }


def test_the_first_rule_that_holds_decides(tiny, process_groups):
    rules = (
        ParameterRule(match="layers.0.*", train=False),
        ParameterRule(match="*.gate", lr=0.5),
        ParameterRule(match="layers.*.attention.*", from_step=10),
    )
    optim = OptimConfig(lr=1e-3, gate_lr=1e-2, warmup_steps=0, rules=rules)
    model = Transformer(tiny("linear", num_layers=3))
    groups = {group["name"]: group for group in parameter_groups(model.named_parameters(), optim)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name: {names[id(each)] for each in group["params"]} for name, group in groups.items()}
    assert not any(name.startswith("layers.0.") for members in found.values() for name in members)
    assert found["gates/1"] == {"layers.1.attention.gate", "layers.2.attention.gate"}
    assert all(".attention." in name for name in found["matrices/2"])
    assert "embedding.weight" in found["matrices"] and "layers.1.feed_forward.linear_up.weight" in found["matrices"]
    assert {name for name, group in groups.items() if group["sleeps"]} == {"matrices/2"}
    rates = [learning_rates(step, 100, optim) for step in (9, 10)]
    assert [rate["matrices/2"] > 0 for rate in rates] == [False, True]
    assert all(rate["gates/1"] > 0.4 and rate["matrices"] < 2e-3 for rate in rates)


@pytest.mark.parametrize("options", [(), ("train.precision=bf16", "parallel.zero_stage=2")], ids=["fp32", "bf16"])
def test_what_is_not_trained_stays_and_is_saved(configure, options):
    session = open_session(configure(FROZEN, *options))
    before = weights(session)
    drive(session, 2)
    folder = save(session)
    after = weights(session)
    for name, value in before.items():
        still = torch.equal(value, after[name])
        assert still if ".feed_forward." in name or name.startswith("embedding.") else not still, name
    assert not any(".feed_forward." in shard.name for shard in session.engine.shards())
    checkpoint = store.open_checkpoint(folder)
    assert set(checkpoint.names("master")) == set(before)
    assert not any(".feed_forward." in name for name in checkpoint.names("exp_avg"))


@pytest.mark.parametrize("rules", [FROZEN, SLEEPING])
def test_a_resumed_run_goes_on_exactly(configure, rules):
    session = open_session(configure(rules))
    drive(session, 2)
    save(session)
    drive(session, 3)
    expected = capture(session)
    resumed = open_session(configure(rules))
    assert resumed.step == 2
    drive(resumed, 3)
    assert_same(capture(resumed), expected)


def test_what_is_frozen_comes_from_the_checkpoint_and_not_from_the_seed(configure):
    session = open_session(configure(FROZEN))
    with torch.no_grad():
        for name, parameter in session.stages.transformers()[0].named_parameters():
            if ".feed_forward." in name:
                parameter.add_(1.0)
    expected = weights(session, ".feed_forward.")
    drive(session, 1)
    save(session)
    found = weights(open_session(configure(FROZEN)), ".feed_forward.")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_sleeps_has_no_part_in_a_step_before_its_own(configure):
    """Its moments stay zeros, and the others move exactly as if it were frozen."""
    frozen = open_session(configure(FROZEN.split(", {")[0] + "]"))
    expected, others = [(step.loss, step.grad_norm) for step in drive(frozen, 3)], weights(frozen)
    session = open_session(configure(SLEEPING))
    before = weights(session, ".feed_forward.")
    assert [(step.loss, step.grad_norm) for step in drive(session, 3)] == expected
    assert all(torch.equal(value, before[name]) for name, value in weights(session, ".feed_forward.").items())
    sleeping = [shard for shard in session.engine.shards() if ".feed_forward." in shard.name and shard.kind != "master"]
    assert sleeping and not any(shard.values.any() for shard in sleeping)
    assert all(torch.equal(others[name], value) for name, value in weights(session).items())
    drive(session, 1)
    assert not any(torch.equal(value, before[name]) for name, value in weights(session, ".feed_forward.").items())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[{match: 'layer.*', train: false}]", r"optim.rules: layer.\*: no parameter has such a name"),
        ("[{match: '*', lr: 1e-3}, {match: '*.gate', train: false}]", r"optim.rules: \*.gate: no parameter"),
        ("[{match: '*', train: false}]", "optim.rules: nothing is left to train"),
        ("[{match: '*', train: false, lr: 1e-3}]", "optim.rules.lr: has no meaning where train is false"),
        ("[{match: '', lr: 1e-3}]", "optim.rules.match: must not be empty"),
    ],
)
def test_rules_that_mean_nothing_are_refused(configure, rules, message):
    with pytest.raises(ConfigError, match=message):
        open_session(configure(f"optim.rules={rules}"))


def test_pipeline_stages_with_other_groups_are_refused(tiny, process_groups, monkeypatch):
    """DeepSpeed's ranks meet once a group: they would wait for each other for ever."""
    model = Transformer(tiny("linear"))
    optim = OptimConfig(rules=(ParameterRule(match="norm_final.*", lr=1e-3),))
    named, asked = list(model.named_parameters()), []

    def other_rank_has_a_group_less(value):
        asked.append(value)
        return value if value >= 0 else value + 1

    monkeypatch.setattr("infini_train.train.freezing.mesh.max_over_world", other_rank_has_a_group_less)
    with pytest.raises(ConfigError, match="optim.rules: pipeline stages must have .* they have 3 to 4"):
        check_rules(named, optim)
    assert asked == [0.0, 4.0, -4.0]


def test_a_step_beyond_the_run_is_refused(configure):
    with pytest.raises(ConfigError, match=r"optim.rules: \*: from_step 1000000 is not reached in a run of"):
        configure("optim.rules=[{match: '*', from_step: 1000000}]")


def test_a_teacher_needs_a_memory_that_learns(configure):
    with pytest.raises(ConfigError, match="train.teacher: no layer has a compressive memory"):
        configure("train.teacher={share: 0.5}", "model.attention={kind: full}")


def test_memory_is_not_asked_for_the_moments_of_what_is_frozen(configure):
    assert least_bytes(configure(FROZEN)) < least_bytes(configure())


def test_what_is_reported_are_the_rates_of_what_is_trained(configure, caplog):
    config = configure("optim.rules=[{match: 'layers.*', lr: 5e-3}, {match: '*', train: false}]", "train.max_steps=4")
    train(config)
    (row, *_) = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    assert {name for name in row if name.startswith("lr/")} == {"lr/matrices/0", "lr/vectors/0", "lr/gates/0"}


def test_zero_3_takes_no_frozen_parameters(configure):
    with pytest.raises(ConfigError, match="optim.rules: with parallel.zero_stage 3 all parameters are trained"):
        configure(FROZEN, "parallel.zero_stage=3")
