"""Losses by position and by context: against one forward over the whole document with the same tokens visible."""

import numpy as np
import pytest
import torch

from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.eval.context_losses import ContextPlan, bucket_edges, measure_document

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


@torch.no_grad()
def losses_of(model, ids: np.ndarray, start: int = 0) -> np.ndarray:
    """Losses of all positions of a document in one forward; a document of its own begins at `start`."""
    tokens = np.concatenate(([BOS], ids)).astype(np.int64)
    tokens[start] = BOS
    starts_BT = torch.zeros(1, len(tokens), dtype=torch.bool)
    starts_BT[0, [0, start]] = True
    labels = torch.from_numpy(np.concatenate((ids.astype(np.int64), [EOS])))[None]
    grid = model.make_grids(starts_BT, torch.ones(starts_BT.shape), None)
    return model(torch.from_numpy(tokens)[None], grid, None, labels)[0][0].double().numpy()


def test_buckets_and_targets_are_those_of_one_forward(variant, tools, tmp_path):
    """A document of 330 tokens: whole buckets, a ragged one, targets that cross segments and forwards."""
    model, dataset = tools.build(variant), tools.write(tmp_path / "data", [20, 330])
    plan = ContextPlan(contexts_tokens=(1, 5, 24, 61), targets=3, target_tokens=13)
    seen: list[int] = []
    found = measure_document(model, dataset, 1, plan, on_progress=seen.append)
    ids = dataset.read(1, 0, 330)
    whole = losses_of(model, ids)
    edges = [*bucket_edges(330)[:-1], 331]
    assert edges == [0, 64, 128, 256, 331] and found.bucket_tokens == [64, 64, 128, 75]
    expected = [whole[first:end].sum() for first, end in zip(edges[:-1], edges[1:], strict=True)]
    np.testing.assert_allclose(found.bucket_losses, expected, rtol=1e-5)
    assert len(found.target_positions) == 3 and min(found.target_positions) >= 61
    for target, losses in zip(found.target_positions, found.target_losses, strict=True):
        scored = slice(target, target + 13)
        cut = [losses_of(model, ids, target - context)[scored].sum() for context in plan.contexts_tokens]
        np.testing.assert_allclose(losses, [*cut, whole[scored].sum()], rtol=1e-5)
    assert sum(seen) >= 331 + 3 * 4 * 13


def test_context_that_reaches_to_the_beginning_is_the_whole(tools, tmp_path):
    """The only place for a target lies as far from the beginning as the context reaches."""
    model, dataset = tools.build("delta"), tools.write(tmp_path / "data", [99])
    plan = ContextPlan(contexts_tokens=(90, 3), targets=4, target_tokens=10)
    found = measure_document(model, dataset, 0, plan)
    assert found.target_positions == [90]
    ((far, near, whole),) = found.target_losses
    assert far == pytest.approx(whole, rel=1e-6) and near != pytest.approx(whole, rel=1e-3)


def test_the_forward_size_changes_nothing(tools, tmp_path):
    model, dataset = tools.build("linear-overlap"), tools.write(tmp_path / "data", [200])
    plan = ContextPlan(contexts_tokens=(40,), targets=5, target_tokens=7)
    small, large = (measure_document(model, dataset, 0, plan, window_tokens=size) for size in (8, 4096))
    np.testing.assert_allclose(small.target_losses, large.target_losses, rtol=1e-5)
    np.testing.assert_allclose(small.bucket_losses, large.bucket_losses, rtol=1e-5)


def test_targets_lie_behind_the_largest_context_in_even_stretches():
    plan = ContextPlan(contexts_tokens=(100, 1000), targets=10, target_tokens=50)
    places = plan.place_targets(3, 11_049)
    assert len(places) == 10
    assert all(1000 + 1000 * i <= place <= 1000 + 1000 * (i + 1) for i, place in enumerate(places))
    assert plan.place_targets(3, 1048) == [] and plan.place_targets(3, 1049) == [1000]
    assert places == plan.place_targets(3, 11_049) != plan.place_targets(4, 11_049)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts_tokens": ()}, "--contexts: give at least one"),
        ({"contexts_tokens": (8, 0)}, "--contexts: give at least one, each positive"),
        ({"contexts_tokens": (8, 8)}, "--contexts: the same one is given twice"),
        ({"targets": 0}, "--targets: must be positive"),
        ({"target_tokens": 0}, "--target-tokens: must be positive"),
        ({"seed": -1}, "--seed: must not be negative"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ContextPlan(**changes)
