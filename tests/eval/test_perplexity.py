"""Held-out perplexity: what is counted, and that the windows it is read in make no difference."""

import math

import numpy as np
import pytest
import torch

from infini_train.eval.perplexity import evaluate_perplexity, unigram_entropy
from infini_train.parallel.pipeline import Stages

LENGTHS = (5, 29, 40, 3, 61, 0, 22)
TOKENS = sum(length + 1 for length in LENGTHS)  # each document also predicts its end


@pytest.fixture(scope="module")
def dataset(tools, tmp_path_factory):
    return tools.write(tmp_path_factory.mktemp("eval") / "data", LENGTHS)


def evaluate(model, dataset, **options):
    """Perplexity of a whole model."""
    stages = Stages(model.config)
    stages.stages[0] = model
    return evaluate_perplexity(stages, dataset, **options)


def loss_in_one_pass(model, dataset) -> float:
    """Mean loss over all documents, one behind the other in one forward."""
    tokens, labels, starts = [], [], []
    for document, length in enumerate(LENGTHS):
        content = dataset.read(document, 0, length).tolist()
        tokens += [dataset.manifest.bos_id, *content]
        labels += [*content, dataset.manifest.eos_id]
        starts += [True] + [False] * length
    tokens_BT = torch.tensor([tokens])
    with torch.no_grad():
        grid = model.make_grids(torch.tensor([starts]), torch.ones(tokens_BT.shape), None)
        loss_BT, _ = model(tokens_BT, grid, None, torch.tensor([labels]))
    return loss_BT.double().mean().item()


@pytest.mark.parametrize("window_tokens", [8, 24, 64, 256])
def test_streaming_equals_one_pass(variant, window_tokens, dataset, tools):
    """Full layers carry nothing from window to window, so only a window that holds everything compares."""
    if variant in ("full", "mixed") and window_tokens < TOKENS:
        window_tokens = 256
    model = tools.build(variant)
    found = evaluate(model, dataset, lanes=1, window_tokens=window_tokens)
    assert found.loss == pytest.approx(loss_in_one_pass(model, dataset), rel=1e-5)
    assert (found.tokens, found.documents) == (TOKENS, len(LENGTHS))


@pytest.mark.parametrize("lanes", [2, 3, 16])
def test_documents_side_by_side_equal_one_after_the_other(variant, lanes, tools, tmp_path):
    """Documents that fill whole segments begin at the same phase of the grid in every lane."""
    dataset = tools.write(tmp_path / "data", (7, 31, 15, 23, 7, 39, 15))
    model = tools.build(variant)
    stream = evaluate(model, dataset, lanes=1, window_tokens=256)
    batch = evaluate(model, dataset, lanes=lanes, window_tokens=256)
    assert batch.loss == pytest.approx(stream.loss, rel=1e-5)
    assert batch.unigram_entropy == pytest.approx(stream.unigram_entropy)
    assert (batch.tokens, batch.documents, batch.n_bytes) == (stream.tokens, stream.documents, stream.n_bytes)


@pytest.mark.parametrize(("lanes", "window_tokens"), [(1, 8), (3, 64), (5, 16), (20, 8)])
def test_padding_never_counts(lanes, window_tokens, dataset, tools):
    seen: list[int] = []
    found = evaluate(tools.build("delta"), dataset, lanes=lanes, window_tokens=window_tokens, on_progress=seen.append)
    assert found.tokens == sum(seen) == TOKENS
    assert found.documents == len(LENGTHS)
    assert found.n_bytes == pytest.approx(2 * sum(LENGTHS))
    assert found.bits_per_byte == pytest.approx(found.loss * TOKENS / math.log(2) / (2 * sum(LENGTHS)))


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_model_that_knows_nothing_has_loss_ln_v(lanes, dataset, tools):
    model = tools.build("linear")
    with torch.no_grad():
        model.head.weight.zero_()
    found = evaluate(model, dataset, lanes=lanes, window_tokens=16)
    assert found.loss == pytest.approx(math.log(259), rel=1e-6)
    assert found.perplexity == pytest.approx(259, rel=1e-5)


def test_forgetting_at_each_window_differs(dataset, tools):
    model = tools.build("linear")
    carried, forgotten = (
        evaluate(model, dataset, lanes=1, window_tokens=8, carry_memory=carry).loss for carry in (True, False)
    )
    alone = evaluate(tools.build("local"), dataset, lanes=1, window_tokens=8).loss
    assert abs(carried - forgotten) > 1e-3
    assert forgotten == pytest.approx(alone, rel=1e-5), "windows of one segment without memory are local attention"


def test_max_tokens_stops_early(dataset, tools):
    found = evaluate(tools.build("local"), dataset, lanes=2, window_tokens=8, max_tokens=30)
    assert 30 <= found.tokens < 30 + 2 * 8
    assert found.documents <= len(LENGTHS)


def test_the_models_mode_and_gradients_are_left_alone(dataset, tools):
    model = tools.build("delta").train()
    evaluate(model, dataset, lanes=2, window_tokens=8)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [
        ([5, 5], math.log(2)),
        ([3, 1], 0.5623351446188083),  # -(3/4 ln 3/4 + 1/4 ln 1/4)
        ([1, 1, 2, 0], 1.0397207708399179),  # 3/2 ln 2
        ([7, 0, 0], 0.0),
        ([1] * 259, math.log(259)),
    ],
)
def test_unigram_entropy(counts, entropy):
    assert unigram_entropy(np.array(counts)) == pytest.approx(entropy, abs=1e-12)


def test_no_tokens_have_no_entropy():
    assert math.isnan(unigram_entropy(np.zeros(4, np.int64)))


def test_unigram_entropy_is_that_of_the_labels(dataset, tools):
    labels = []
    for document, length in enumerate(LENGTHS):
        labels += [*dataset.read(document, 0, length).tolist(), dataset.manifest.eos_id]
    share = [labels.count(token) / len(labels) for token in set(labels)]
    found = evaluate(tools.build("local"), dataset, lanes=3, window_tokens=16)
    assert found.unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in share))
