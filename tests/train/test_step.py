"""One step: how it divides into micro-batches, what the loss counts, where gradients flow, and what it refuses."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from infini_train.checkpoint import store
from infini_train.data.lanes import IGNORED, Batch
from infini_train.parallel.pipeline import cut_micro_batches
from infini_train.train.carry import join_lanes
from infini_train.train.checkpointing import save_session
from infini_train.train.opening import open_session
from infini_train.train.optim import learning_rates
from infini_train.train.session import Session
from infini_train.train.step import train_step

LANES, WINDOW = 4, 32


def save(session: Session) -> Path:
    """A checkpoint, complete."""
    save_session(session)
    session.saver.wait()
    return store.resolve(session.config.directory)


def draw_batch(seed: int, valid_labels: tuple[int, ...] = (WINDOW,) * LANES) -> Batch:
    """Random tokens; lane b keeps its first `valid_labels[b]` labels. Documents begin inside some windows."""
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(0, 256, (LANES, WINDOW + 1))
    labels_BT = tokens_BT[:, 1:].copy()
    starts_BT = np.zeros((LANES, WINDOW), bool)
    starts_BT[1, 13] = starts_BT[3, 16] = True
    for lane, count in enumerate(valid_labels):
        labels_BT[lane, count:] = IGNORED
    return Batch(
        tokens_BT=tokens_BT[:, :-1],
        labels_BT=labels_BT,
        starts_BT=starts_BT,
        weights_BT=np.ones((LANES, WINDOW), np.float32),
        document_B=np.arange(LANES),
        n_bytes=float(LANES * WINDOW),
    )


def step(session, batch):
    rates = learning_rates(session.step, session.config.train.total_steps, session.config.optim)
    return train_step(session.stages, session.engine, batch, session.carried, rates)


def loss_by_hand(session, batch) -> float:
    """Sum over valid labels of -log softmax, over their count, all lanes at once."""
    model, everything = session.stages.transformers()[0], iter(cut_micro_batches(batch, 1))
    tokens, labels, starts, weights, _ = next(everything)
    with torch.no_grad():
        hidden_TBD, _ = model.decode(tokens, model.make_grids(starts, weights, None), None)
        log_p_BTV = model.logits(hidden_TBD).log_softmax(-1).transpose(0, 1)
    valid = labels != IGNORED
    picked = log_p_BTV.gather(2, labels.clamp_min(0)[..., None])[..., 0]
    return -(picked[valid].double().sum() / valid.sum()).item()


@pytest.mark.parametrize(
    "valid_labels",
    [(32, 32, 32, 32), (32, 1, 7, 20), (32, 20, 0, 0), (0, 0, 0, 5)],
    ids=["full", "ragged", "half", "few"],
)
@pytest.mark.parametrize("attention", ["linear", "delta"])
def test_micro_batches_are_one_batch(attention, valid_labels, configure, tools):
    batch, found = draw_batch(3, valid_labels), {}
    for lanes in (4, 2, 1):
        config = configure(
            f"model.attention={tools.attention[attention]}", f"train.micro_batch_lanes={lanes}", run=f"lanes{lanes}"
        )
        session = open_session(config)
        expected = loss_by_hand(session, batch)
        result = step(session, batch)
        assert result.loss == pytest.approx(expected, rel=1e-6)
        assert result.labels == sum(valid_labels)
        found[lanes] = result.grad_norm, tools.capture(session)
    for lanes in (2, 1):
        assert found[lanes][0] == pytest.approx(found[4][0], rel=1e-5)
        for name, value in found[lanes][1].items():
            if name.startswith("exp_avg "):  # (1 - beta1) x the clipped gradient: compares all gradients
                torch.testing.assert_close(value, found[4][1][name], rtol=1e-4, atol=1e-7)
            elif name.startswith("weight"):
                # AdamW's first step is lr x sign(gradient) almost everywhere: look at the gradients above for the rest
                close = (value - found[4][1][name]).abs() < 1e-5
                assert close.float().mean() > 0.99, name


def test_a_batch_without_text_is_left_out(configure, tools):
    session = open_session(configure())
    before = {name: p.detach().clone() for name, p in session.stages.transformers()[0].named_parameters()}
    batch = dataclasses.replace(draw_batch(0, (0, 0, 0, 0)), weights_BT=np.zeros((LANES, WINDOW), np.float32))
    assert step(session, batch).problem == "none of its text can be read"
    tools.assert_same(dict(session.stages.transformers()[0].named_parameters()), before)


@pytest.mark.parametrize("attention", ["linear", "delta", "local"])
def test_text_without_labels_is_read_only(attention, configure, tools):
    """A window in the middle of a book: weights and optimizer stay, and the memory is that of a step with labels."""
    config = configure(f"model.attention={tools.attention[attention]}", "train.micro_batch_lanes=2")
    session = open_session(config)
    before = tools.capture(session)
    silent, loud = (step(session, draw_batch(7, labels)) for labels in ((0, 0, 0, 0), (32, 32, 32, 32)))
    assert silent.problem == "" and silent.labels == 0 and math.isnan(silent.loss)
    fresh = open_session(config)
    after = step(fresh, draw_batch(7, (0, 0, 0, 0)))
    fresh.advance(after, fresh.lanes)
    kept = {name: value for name, value in before.items() if not name.startswith("carry ")}
    tools.assert_same({name: value for name, value in tools.capture(fresh).items() if name in kept}, kept)
    assert fresh.step == 1 and fresh.guard.in_a_row == fresh.guard.skipped == 0
    assert not list(fresh.guard.to_json()["losses"]), "a loss that isn't there is no number to compare with"
    found, expected = (join_lanes(session.stages, result.states) for result in (silent, loud))
    assert found.keys() == expected.keys() and found
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_weights_of_labels_weigh_their_losses(configure):
    """Weight 2 for some labels and 0 for others is what loss and gradients count them with."""
    session = open_session(configure("train.max_steps=3"))
    plain = draw_batch(0, (32, 20, 32, 32))
    weights_BT = np.random.default_rng(1).choice([0.0, 1.0, 2.0], (LANES, WINDOW)).astype(np.float32)
    model, batch = session.stages.transformers()[0], dataclasses.replace(plain, loss_weights_BT=weights_BT)
    tokens, labels, starts, weights, _ = cut_micro_batches(plain, 1)[0]
    with torch.no_grad():
        loss_BT, _ = model(tokens, model.make_grids(starts, weights, None), None, labels)
    valid_BT = labels.numpy() != IGNORED
    expected = (loss_BT.numpy() * weights_BT).sum() / weights_BT[valid_BT].sum()
    result = step(session, batch)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.labels == valid_BT.sum()
    again = open_session(configure("train.max_steps=3", run="plain"))
    assert step(again, plain).grad_norm != pytest.approx(result.grad_norm, rel=1e-3)


def test_padding_has_no_influence(configure, tools):
    """Tokens of weight 0 without labels, after a start mark as the reader leaves them, change nothing."""
    found = []
    for padding in (258, 7):
        session = open_session(configure(run=f"padding{padding}"))
        batch = draw_batch(1, (20, 20, 20, 20))
        batch.starts_BT[:, 20] = True
        batch.tokens_BT[:, 20:] = padding
        batch.weights_BT[:, 20:] = 0
        result = step(session, batch)
        found.append((result.loss, result.grad_norm))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_no_number_changes_nothing(precision, configure, tools):
    session = open_session(configure(f"train.precision={precision}"))
    tools.drive(session, 2)
    with torch.no_grad():
        session.stages.transformers()[0].embedding.weight[200] = math.nan  # the documents don't hold this byte
    before, position = tools.capture(session), session.lanes
    batch = draw_batch(0)
    batch.tokens_BT[2, 5] = 200
    assert step(session, batch).problem == "the loss is nan"
    after = tools.capture(session)
    assert before.keys() == after.keys() and session.lanes == position and session.step == 2
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_that_are_no_numbers_change_nothing(precision, configure, tools):
    """All embeddings at 0 under a tiny norm_eps: the loss is ln V, and the gradients overflow."""
    session = open_session(configure(f"train.precision={precision}", "model.norm_eps=1e-38", "model.num_layers=6"))
    with torch.no_grad():
        session.stages.transformers()[0].embedding.weight.zero_()
    before = tools.capture(session)
    assert step(session, draw_batch(0)).problem == "the gradients are not finite"
    tools.assert_same(tools.capture(session), before)
    assert session.engine.optimizer_steps() == 0
    with torch.no_grad():
        session.stages.transformers()[0].embedding.weight.normal_(std=0.02)
    assert math.isfinite(step(session, draw_batch(0)).grad_norm), "nothing of the bad gradients is left"


def test_carried_memory_changes_the_next_loss(configure):
    losses = {}
    for carry in (True, False):
        session = open_session(configure(f"train.carry_memory={str(carry).lower()}", run=f"carry{carry}"))
        first = step(session, draw_batch(0))
        session.advance(first, session.lanes)
        losses[carry] = first.loss, step(session, draw_batch(1)).loss
        if carry:  # lanes 1 and 3 began documents at 13 and 16: the segments before hold nothing for the next window
            written = [state[0].memory.written_B.tolist() for state in session.carried[0]]
            assert written == [[32.0, 19.0], [32.0, 16.0]]
    assert losses[True][0] == losses[False][0], "the first window has nothing to remember"
    assert abs(losses[True][1] - losses[False][1]) > 1e-4


def test_without_carry_every_window_begins_empty(configure):
    session = open_session(configure("train.carry_memory=false"))
    for seed in range(2):
        batch = draw_batch(seed)
        expected = loss_by_hand(session, batch)  # from an empty state
        result = step(session, batch)
        assert result.loss == pytest.approx(expected, rel=1e-6)
        session.advance(result, session.lanes)
        assert session.carried == ((None, None),)
    save(session)
    assert open_session(session.config).carried == ((None, None),)


def embedding_gradient(session, batch, state):
    """Norm of the gradient of the last segment's loss by the window's embeddings, (T,), and the next state."""
    model, kept = session.stages.transformers()[0], []
    hook = model.embedding.register_forward_hook(lambda module, inputs, output: kept.append(output))
    last = dataclasses.replace(batch, labels_BT=batch.labels_BT.copy())
    last.labels_BT[:, : WINDOW - 8] = IGNORED
    tokens, labels, starts, weights, _ = next(iter(cut_micro_batches(last, 1)))
    loss, after = model(tokens, model.make_grids(starts, weights, state), state, labels, torch.ones(labels.shape))
    hook.remove()
    (gradient_TBD,) = torch.autograd.grad(loss, kept[0])
    return gradient_TBD[:, 0].norm(dim=-1), after


@pytest.mark.parametrize(
    ("attention", "reaches"), [("linear", True), ("delta", True), ("full", True), ("local", False)]
)
def test_gradients_flow_through_all_segments_of_the_window(attention, reaches, configure, tools):
    chosen = tools.attention[attention].replace(", overlap_tokens: 3", "")
    session = open_session(configure(f"model.attention={chosen}", "train.micro_batch_lanes=4"))
    gradient_T, _ = embedding_gradient(session, draw_batch(0), None)
    assert (gradient_T[WINDOW - 8 :] > 0).all()
    assert (gradient_T[:8] > 0).all() == reaches
    if not reaches:
        assert not gradient_T[: WINDOW - 8].any()


def tensors(state):
    """Those of a state, some of whose fields may be None."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(leaf)]


@pytest.mark.parametrize("attention", ["linear", "delta"])
def test_gradients_end_at_the_window(attention, configure, tools):
    session = open_session(configure(f"model.attention={tools.attention[attention]}", "train.micro_batch_lanes=4"))
    model, first = session.stages.transformers()[0], draw_batch(0)
    tokens, labels, starts, weights, _ = next(iter(cut_micro_batches(first, 1)))
    _, state = model(tokens, model.make_grids(starts, weights, None), None, labels)
    carried = model.carry_over(state)
    leaves = tensors(carried)
    assert leaves and not any(leaf.requires_grad for leaf in leaves)
    assert any(leaf.requires_grad for leaf in tensors(state)), "inside the window they flow"
    result = step(session, first)
    assert not any(leaf.requires_grad for leaf in tensors(result.states))


def test_clipping_and_parts_of_the_time(configure):
    session = open_session(configure("optim.clip_norm=1e-3", "optim.eps=1.0", "optim.weight_decay=0"))
    before = session.stages.transformers()[0].embedding.weight.detach().clone()
    result = step(session, draw_batch(0))
    assert result.grad_norm > 0.1, "the norm before clipping"
    moved = (session.stages.transformers()[0].embedding.weight - before).norm().item()
    assert 0 < moved <= 1e-3 * session.config.optim.lr  # eps 1 makes AdamW's step about lr x gradient
    assert set(result.seconds) == {"wait", "forward", "backward", "optimizer"} and min(result.seconds.values()) > 0
