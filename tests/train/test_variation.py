"""What a step draws, and that it does what was drawn: segments of another length, layers without local attention."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from infini_train.data.lanes import IGNORED, Batch
from infini_train.model.ablation import Part, leave_out
from infini_train.parallel.pipeline import cut_micro_batches
from infini_train.train.loop import train
from infini_train.train.opening import open_session
from infini_train.train.optim import learning_rates
from infini_train.train.session import Session
from infini_train.train.step import StepResult, train_step
from infini_train.train.variation import AS_EVALUATED, Variation, draw_variation

LANES, WINDOW = 4, 32
LENGTHS = "train.segment_tokens=[4, 8, 32]"
DROPOUT = ("train.local_dropout=0.8", "train.local_dropout_steps=400", "train.max_steps=1000")


def draw_batch(seed: int) -> Batch:
    """Random tokens; documents begin inside some windows."""
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(0, 256, (LANES, WINDOW + 1))
    starts_BT = np.zeros((LANES, WINDOW), bool)
    starts_BT[1, 13] = starts_BT[3, 16] = True
    weights_BT = np.ones((LANES, WINDOW), np.float32)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:].copy(), starts_BT, weights_BT, np.arange(LANES), float(WINDOW))


def step(session: Session, batch: Batch, variation: Variation, **options) -> StepResult:
    rates = learning_rates(session.step, session.config.train.total_steps, session.config.optim)
    ours = session.stages, session.engine, batch, session.carried, rates
    return train_step(*ours, variation=variation, **options)


def moments(session: Session) -> dict[str, torch.Tensor]:
    return {each.name: each.values.clone() for each in session.engine.shards() if each.kind == "exp_avg"}


# ------------------------------------------------------------------------------------------------------ what is drawn


def test_nothing_is_drawn_by_default(configure):
    assert {draw_variation(configure(), step) for step in range(20)} == {AS_EVALUATED}


def test_a_draw_is_that_of_seed_and_step(configure):
    config = configure(LENGTHS, *DROPOUT)
    drawn = [draw_variation(config, step) for step in range(100)]
    assert [draw_variation(config, step) for step in reversed(range(100))] == drawn[::-1]
    assert [draw_variation(configure(LENGTHS, *DROPOUT, "seed=1"), step) for step in range(100)] != drawn


def test_one_option_does_not_change_the_draws_of_the_other(configure):
    both, lengths, dropout = configure(LENGTHS, *DROPOUT), configure(LENGTHS), configure(*DROPOUT)
    for number in range(100):
        expected = Variation(
            draw_variation(lengths, number).segment_tokens, draw_variation(dropout, number).without_local
        )
        assert draw_variation(both, number) == expected


def test_lengths_are_drawn_alike_and_one_that_is_given_twice_twice_as_often(configure):
    config = configure("train.segment_tokens=[4, 8, 8]")
    counts = Counter(draw_variation(config, step).segment_tokens for step in range(3000))
    assert set(counts) == {4, 8} and 900 < counts[4] < 1100


def test_the_share_without_local_attention_falls_to_nothing(configure):
    config = configure(*DROPOUT)
    dropped = np.array([draw_variation(config, step).without_local for step in range(600)])
    assert abs(dropped[:100].mean() - 0.7) < 0.15 and abs(dropped[200:300].mean() - 0.3) < 0.15
    assert not dropped[400:].any()
    assert draw_variation(configure("train.local_dropout=1.0"), 0).without_local


def test_the_cost_of_writing_rises_to_what_was_asked_for(configure):
    gated = "model.attention={kind: infini, segment_tokens: 8, update: gated_delta}"
    config = configure(gated, "train.write_cost=0.2", "train.write_cost_steps=100")
    costs = [draw_variation(config, step).write_cost for step in (0, 25, 50, 100, 1000)]
    assert costs == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.2])


# ------------------------------------------------------------------------------------------------------- what is done


@pytest.mark.parametrize("attention", ["linear", "delta", "local"])
def test_a_step_of_another_length_is_that_of_a_model_of_this_length(attention, configure, tools):
    """Loss, gradients and memory, also from the memory that steps of other lengths have left."""
    found = []
    for is_drawn in (True, False):
        session = open_session(configure(f"model.attention={tools.attention[attention]}", run=f"drawn{is_drawn}"))
        for number, size in enumerate((8, 16, 4, 32, 8)):
            if not is_drawn:
                for layer in session.stages.transformers()[0].layers.values():
                    layer.attention.layout = layer.attention.layout._replace(segment_tokens=size)
            result = step(session, draw_batch(number), Variation(size) if is_drawn else AS_EVALUATED)
            session.advance(result, session.lanes)
            found.append(((result.loss, result.grad_norm), tools.capture(session)))
    for (drawn, after), (expected, expected_after) in zip(found[:5], found[5:], strict=True):
        assert drawn == expected
        tools.assert_same(after, expected_after)


def test_a_step_without_local_attention_is_that_of_a_model_without_it(configure, tools):
    settings, batch = (f"model.attention={tools.attention['delta']}", "train.micro_batch_lanes=4"), draw_batch(0)
    twin = open_session(configure(*settings, run="twin")).stages.transformers()[0]
    leave_out(twin, [Part("local")])
    tokens, labels, starts, weights, _ = cut_micro_batches(batch, 1)[0]
    factors_BT = torch.ones(labels.shape) / (labels != IGNORED).sum()
    expected, _ = twin(tokens, twin.make_grids(starts, weights, None), None, labels, factors_BT)
    gradients = torch.autograd.grad(expected, list(twin.parameters()))

    session = open_session(configure(*settings))
    result = step(session, batch, Variation(None, without_local=True))
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    layers = session.stages.transformers()[0].layers.values()
    assert not any(layer.attention.left_out for layer in layers), "the next step has it again"
    scale, found = 0.1 * min(1.0, session.config.optim.clip_norm / result.grad_norm), moments(session)  # 1 - beta1
    for (name, _), gradient in zip(twin.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(found[name], scale * gradient.flatten(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_no_gradient_of_an_earlier_step_is_used_again(zero_stage, configure):
    """In one segment without local attention nobody reads the keys and values: their gradient is nothing."""
    session = open_session(configure(f"parallel.zero_stage={zero_stage}"))
    for number in range(2):
        session.advance(step(session, draw_batch(number), AS_EVALUATED), session.lanes)
    before = moments(session)
    session.advance(step(session, draw_batch(2), Variation(WINDOW, without_local=True)), session.lanes)
    after, unread = moments(session), [name for name in before if "linear_k" in name or "linear_v" in name]
    assert len(unread) == 4 and all(before[name].any() for name in unread)
    for name in before:
        is_decayed = torch.allclose(after[name], 0.9 * before[name], rtol=1e-6, atol=0)
        assert is_decayed == (name in unread), name


def test_its_loss_is_compared_with_no_other(configure, monkeypatch):
    session = open_session(configure("guard.spikes=skip"))
    monkeypatch.setattr(session.reader, "observe_loss", lambda position, loss: pytest.fail("it is not to be judged"))
    result = step(session, draw_batch(0), Variation(None, without_local=True), find_problem=lambda loss: "a spike")
    assert result.problem == "" and math.isfinite(result.loss) and math.isnan(result.comparable_loss)
    session.advance(result, session.lanes)
    assert session.step == 1 and session.guard.to_json() == {"skipped": 0, "in_a_row": 0, "losses": []}
    assert step(session, draw_batch(1), AS_EVALUATED, find_problem=lambda loss: "a spike").problem == "a spike"


def test_text_without_labels_is_read_as_drawn(configure):
    """A window in the middle of a book: the memory is that of a step with labels."""
    session, silent = open_session(configure()), draw_batch(0)
    silent.labels_BT[:] = IGNORED
    drawn = (AS_EVALUATED, Variation(4), Variation(4, without_local=True))
    memories = [step(session, silent, each).states[0][0][1].memory.memory_BKDE for each in drawn]
    for one, other in itertools.combinations(memories, 2):
        assert (one - other).abs().max() > 1e-4
    expected = step(session, draw_batch(0), drawn[2]).states[0][0][1].memory.memory_BKDE
    torch.testing.assert_close(memories[2], expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the whole loop


def test_the_training_loop_does_and_shows_what_is_drawn(configure, tools):
    settings = ("train.segment_tokens=[4, 8, 16]", "train.local_dropout=0.9", "train.local_dropout_steps=6")
    by_hand = open_session(configure(*settings, run="by_hand"))
    steps = tools.drive(by_hand, 6)
    config = configure(*settings)
    tools.assert_same(tools.capture(train(config)), tools.capture(by_hand))
    drawn = [draw_variation(config, number) for number in range(6)]
    assert len({each.segment_tokens for each in drawn}) > 1 and len({each.without_local for each in drawn}) == 2
    rows = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss/train" in row]
    assert [(row["variation/segment_tokens"], row["variation/without_local"]) for row in rows] == [
        each[:2] for each in drawn
    ]
    assert [row["loss/train"] for row in rows] == [each.loss for each in steps]


def test_what_is_off_is_not_shown(configure):
    for settings, tags in ((["train.segment_tokens=[4]"], {"segment_tokens"}), (list(DROPOUT[:2]), {"without_local"})):
        config = configure(*settings, "train.max_steps=3", run=tags.copy().pop())
        train(config)
        shown = set().union(*map(json.loads, (config.directory / "metrics.jsonl").read_text().splitlines()))
        assert {tag for tag in shown if tag.startswith("variation/")} == {f"variation/{tag}" for tag in tags}
