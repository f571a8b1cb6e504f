"""What writing costs: the gradient is that of the loss and a term for every token, layer and head."""

import pytest
import torch
import torch.nn.functional as F

from infini_train.model.infini import WEAKEST_WRITE, GatedInfiniAttention
from infini_train.model.write_cost import charge_writing

TOKENS, COST_PER_TOKEN = 24, 0.03


def loss_of(model):
    """A sum over all outputs, and the strengths' logits of each layer that has them."""
    tokens_BT = torch.arange(2 * TOKENS).view(2, TOKENS) % 40
    starts_BT, weights_BT = torch.zeros(2, TOKENS, dtype=torch.bool), torch.ones(2, TOKENS)
    starts_BT[:, 0] = True
    logits = []
    mixers = [layer.attention for layer in model.layers.values()]
    hooks = [
        mixer.linear_strength.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))
        for mixer in mixers
        if isinstance(mixer, GatedInfiniAttention)
    ]
    out, _ = model.decode(tokens_BT, model.make_grids(starts_BT, weights_BT, None), None)
    for hook in hooks:
        hook.remove()
    return out.square().sum(), logits


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("variant", ["gated", "gated-token"])
def test_the_gradient_is_that_of_the_loss_and_the_cost(tools, variant):
    model = tools.build(tools.tiny(variant))
    plain_loss, logits = loss_of(model)
    terms = [COST_PER_TOKEN * F.softplus(x).sum() / x.shape[-1] / len(logits) for x in logits]
    expected = gradients(model, plain_loss + sum(terms))
    charge_writing([model], COST_PER_TOKEN)
    charged_loss, _ = loss_of(model)
    assert torch.equal(charged_loss, plain_loss), "the loss itself is as it was"
    found = gradients(model, charged_loss)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    charge_writing([model], 0.0)
    free = gradients(model, loss_of(model)[0])
    assert any(not torch.allclose(free[name], found[name], rtol=1e-3, atol=1e-4) for name in free if "strength" in name)


def test_a_weak_write_is_none(tools):
    model = tools.build(tools.tiny("gated"))
    mixer = model.layers["0"].attention
    x_TBD = torch.zeros(5, 1, model.config.hidden_size)
    for bias in (-10.0, -2.8, -2.6, 0.0, 10.0):
        with torch.no_grad():
            mixer.linear_strength.bias.fill_(bias)
            log_kept_BKT, _ = mixer._choose_writing(x_TBD)
        full = F.softplus(torch.tensor(bias))
        assert torch.equal(log_kept_BKT == 0, torch.full_like(log_kept_BKT, bias < -2.7).bool())
        torch.testing.assert_close(log_kept_BKT, -(full - WEAKEST_WRITE).clamp_min(0).expand_as(log_kept_BKT))
