"""Texts read and scored side by side against one sequence at a time, read at once from its beginning."""

import numpy as np
import pytest
import torch

from infini_train.inference.generation import feed
from infini_train.inference.reading import Tail, read_segments, score_tails

LENGTHS = (1, 5, 8, 9, 23, 40, 41, 77, 120)  # below, at and behind segments' and forwards' edges


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(5)
    return [np.append(256, random.integers(0, 256, length - 1)).astype(np.int64) for length in LENGTHS]


@torch.no_grad()
def logprobs_alone(model, text):
    """(T, V) log-probabilities of what follows each token, the whole text in one call."""
    tokens_BT = torch.from_numpy(text)[None]
    starts_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    starts_BT[0, 0] = True
    grid = model.make_grids(starts_BT, torch.ones(tokens_BT.shape), None)
    hidden_TBD, _ = model.decode(tokens_BT, grid, None)
    return model.logits(hidden_TBD)[:, 0].log_softmax(-1)


def test_what_follows_a_text_does_not_depend_on_its_neighbours(variant, tools, texts):
    model, seen = tools.build(variant), []
    tails = read_segments(model, texts, seen.append)
    assert sum(seen) + sum(len(tail.tokens) for tail in tails) == sum(LENGTHS)
    for text, tail in zip(texts, tails, strict=True):
        logits_V, _ = feed(model, tail.tokens.tolist(), tail.state, chunk_tokens=32)
        expected_V = logprobs_alone(model, text)[-1]
        torch.testing.assert_close(logits_V.log_softmax(-1), expected_V, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("lanes", [1, 4, 20])
def test_scores_are_those_of_each_text_alone(variant, lanes, tools, texts):
    """Half of each text is context; the scores are those of the other half, whatever is read beside it."""
    model = tools.build(variant)
    counts = [len(text) // 2 for text in texts]
    tails = read_segments(model, [text[: len(text) - count] for text, count in zip(texts, counts, strict=True)])
    whole = [
        Tail(tail.state, np.append(tail.tokens, text[len(text) - count :]))
        for tail, text, count in zip(tails, texts, counts, strict=True)
    ]
    for text, count, score in zip(texts, counts, score_tails(model, whole, counts, lanes=lanes), strict=True):
        logprobs_TV = logprobs_alone(model, text)[:-1]
        targets_N = torch.from_numpy(text[len(text) - count :])
        expected_NV = logprobs_TV[len(logprobs_TV) - count :]
        expected_N = expected_NV.gather(1, targets_N[:, None])[:, 0]
        np.testing.assert_allclose(score.logprobs_N, expected_N.numpy(), rtol=1e-4, atol=1e-3)
        assert score.greedy_N.tolist() == (expected_NV.argmax(-1) == targets_N).tolist()


def test_greedy_text_is_greedy(tools):
    """What the model would write itself is scored as such, and another token is not."""
    model, text = tools.build("delta"), [256, *b"It was the best"]
    for _ in range(20):
        logits_V, _ = feed(model, text, None, chunk_tokens=32)
        text.append(int(logits_V.argmax()))
    other = [*text[:-1], (text[-1] + 1) % 256]
    tails = [Tail(None, np.array(each)) for each in (text, other)]
    own, wrong = score_tails(model, tails, [20, 20], lanes=2)
    assert own.greedy_N.all()
    assert wrong.greedy_N[:-1].all() and not wrong.greedy_N[-1]
