"""A model as its own teacher: its weights with full attention."""

import dataclasses

import pytest
import torch

from infini_train.config.attention import FullConfig
from infini_train.model.transformer import Transformer

LANES, TOKENS = 2, 32


def draw(seed=0):
    random = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, 40, (2, LANES, TOKENS), generator=random)
    starts = torch.zeros(LANES, TOKENS, dtype=torch.bool)
    starts[1, 13] = True
    return tokens, labels, starts, torch.ones(LANES, TOKENS)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}], ids=["plain", "one-kv-head"])
def test_the_teacher_is_the_same_model_with_full_attention(variant, tools, options):
    model = tools.build(tools.tiny(variant, **options))
    full = Transformer(dataclasses.replace(model.config, attention=FullConfig()))
    weights = full.state_dict()
    full.load_state_dict({name: value for name, value in model.state_dict().items() if name in weights})
    tokens, labels, starts, weights_BT = draw()
    taught_TBD = model.teach(tokens, starts, (0, 1), 0.5).hidden_TBD
    with torch.no_grad():
        expected = full.decode(tokens, full.make_grids(starts, weights_BT, None), None)[0]
        torch.testing.assert_close(taught_TBD, full.norm_final(expected))


def test_within_its_first_segment_a_model_can_learn_nothing_of_its_teacher(tools):
    """There it is full attention already."""
    config = tools.tiny("linear")
    longer = dataclasses.replace(config.attention, segment_tokens=TOKENS)
    model = tools.build(dataclasses.replace(config, attention=longer))
    tokens, labels, starts, weights_BT = draw()
    lesson = model.teach(tokens, starts, (0, 1), 1.0)
    grids = model.make_grids(starts, weights_BT, None)
    sums_3, _ = model(tokens, grids, None, labels, weights_BT, lesson)
    assert sums_3[2].abs() < 1e-4 and sums_3[1] > 1


def test_the_divergence_is_that_of_the_two_distributions(tools):
    model = tools.build(tools.tiny("delta")).double()
    tokens, labels, starts, weights_BT = draw()
    lesson = model.teach(tokens, starts, (0, 1), 0.25)
    grids = model.make_grids(starts, weights_BT, None)
    sums_3, _ = model(tokens, grids, None, labels, weights_BT, lesson)
    with torch.no_grad():
        log_p = model.logits(model.decode(tokens, grids, None)[0]).double().log_softmax(-1)
        log_t = model.head.logits(lesson.hidden_TBD).double().log_softmax(-1)
    divergence = (log_t.exp() * (log_t - log_p)).sum()
    torch.testing.assert_close(sums_3[2], divergence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums_3[0], 0.75 * sums_3[1] + 0.25 * sums_3[2])
    assert divergence > 1e-3
