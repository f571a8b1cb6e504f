"""The whole decoder: options, losses, gradients, activation checkpointing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infini_train.config.attention import InfiniConfig
from infini_train.model.transformer import IGNORED
from infini_train.ops import chunked_loss

OPTIONS = {
    "plain": {},
    "tied": {"tied_embeddings": True},
    "qk-norm": {"qk_norm": True},
    "bias": {"qkv_bias": True},
    "one-kv-head": {"num_kv_heads": 1},
    "all-kv-heads": {"num_kv_heads": None},
    "value-size": {"value_head_dim": 12},
    "everything": {
        "tied_embeddings": True, "qk_norm": True, "qkv_bias": True, "head_dim": 6, "value_head_dim": 10
    },
}  # fmt: skip


def loss_and_gradients(model, tools, tokens=32):
    """Mean loss of two lanes over two calls that carry the state, and the gradient of every parameter."""
    tokens_BT, state, total = tools.draw(tokens + 1), None, 0.0
    starts_BT = torch.zeros(2, tokens // 2, dtype=torch.bool)
    starts_BT[1, 5] = True
    model.zero_grad()
    for begin in (0, tokens // 2):
        piece = slice(begin, begin + tokens // 2)
        grid = model.make_grids(starts_BT, torch.ones(starts_BT.shape), state)
        factors_BT = torch.full(starts_BT.shape, 1 / starts_BT.numel())
        loss, state = model(tokens_BT[:, piece], grid, state, tokens_BT[:, 1:][:, piece], factors_BT)
        total = total + loss
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_gets_a_gradient(option, variant, tools):
    model = tools.build(tools.tiny(variant, **OPTIONS[option]))
    loss, gradients = loss_and_gradients(model, tools)
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert name in gradients and gradients[name].shape == parameter.shape
        assert torch.isfinite(gradients[name]).all() and gradients[name].any(), name


def test_gradients_agree_with_differences(variant, tools):
    """A step along the gradient lowers the loss by what the gradient promises."""
    model = tools.build(tools.tiny(variant, qk_norm=True, value_head_dim=12))
    loss, gradients = loss_and_gradients(model, tools)
    for part in ("linear_q", "linear_k", "linear_v", "linear_o", "embedding", "head", "norm", "feed_forward"):
        chosen = {name: g for name, g in gradients.items() if part in name}
        squared = sum(g.double().square().sum().item() for g in chosen.values())
        rate = 2e-3 / squared  # the loss moves by about 2e-3 from one side to the other
        losses = []
        for sign in (0.5, -0.5):
            moved = tools.build(tools.tiny(variant, qk_norm=True, value_head_dim=12))
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    if name in chosen:
                        parameter.add_(chosen[name], alpha=sign * rate)
            losses.append(loss_and_gradients(moved, tools)[0].item())
        assert losses[0] - losses[1] == pytest.approx(2e-3, rel=0.05), part


def test_activation_checkpointing_changes_nothing(variant, tools):
    config = tools.tiny(variant)
    loss, gradients = loss_and_gradients(tools.build(config), tools)
    again, recomputed = loss_and_gradients(tools.build(config, recompute_layers=True), tools)
    assert again == loss and recomputed.keys() == gradients.keys()
    assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)


def test_activation_checkpointing_keeps_less(tools):
    """Autograd saves the layers' inputs instead of everything inside."""

    def saved_bytes(model) -> int:
        kept: dict[int, int] = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits_BTV, _ = tools.run(model, tools.draw(32))
            del logits_BTV
        return sum(kept.values())

    config = tools.tiny("delta", num_layers=6)
    assert saved_bytes(tools.build(config, recompute_layers=True)) < 0.5 * saved_bytes(tools.build(config))


def test_the_loss_is_the_cross_entropy_of_the_logits(tools):
    model, tokens_BT = tools.build(tools.tiny()), tools.draw(33)
    labels_BT = tokens_BT[:, 1:].clone()
    labels_BT[0, :5] = IGNORED
    grid = model.make_grids(torch.zeros(2, 32, dtype=torch.bool), torch.ones(2, 32), None)
    loss_BT, _ = model(tokens_BT[:, :-1], grid, None, labels_BT)
    logits_BTV, _ = tools.run(model, tokens_BT[:, :-1])
    expected = torch.nn.functional.cross_entropy(
        logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
    )
    torch.testing.assert_close(loss_BT, expected, rtol=1e-5, atol=1e-5)
    assert not loss_BT[0, :5].any() and loss_BT.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in (out if isinstance(out, list | tuple) else [out]) if isinstance(each, torch.Tensor)]
        self.numel = max(self.numel, *(each.numel() for each in tensors), 0)
        return out


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
def test_logits_of_a_whole_window_never_exist(tied, trains, tools, monkeypatch):
    """128 tokens with a vocabulary of 4096: the largest tensor is the weight, or the logits of 8 tokens."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4)
    monkeypatch.setattr(chunked_loss, "LEAST_TOKENS", 8)
    model, tokens_BT = tools.build(tools.tiny(vocab_size=4096, tied_embeddings=tied)), tools.draw(65, vocab=4096)
    grid = model.make_grids(torch.zeros(2, 64, dtype=torch.bool), torch.ones(2, 64), None)
    with Largest() as largest, torch.set_grad_enabled(trains):
        loss, _ = model(tokens_BT[:, :-1], grid, None, tokens_BT[:, 1:], torch.ones(2, 64) if trains else None)
        if trains:
            loss.backward()
    assert largest.numel == 4096 * max(8, model.config.hidden_size) < 4096 * 128


def test_the_weighted_sum_is_that_of_the_losses(tools):
    model, tokens_BT = tools.build(tools.tiny()), tools.draw(33)
    grid = model.make_grids(torch.zeros(2, 32, dtype=torch.bool), torch.ones(2, 32), None)
    factors_BT = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    loss_BT, _ = model(tokens_BT[:, :-1], grid, None, tokens_BT[:, 1:])
    total, _ = model(tokens_BT[:, :-1], grid, None, tokens_BT[:, 1:], factors_BT)
    torch.testing.assert_close(total, (loss_BT * factors_BT).sum())
    assert total.requires_grad and not loss_BT.requires_grad


def test_tied_embeddings_are_one_parameter(tools):
    tied, untied = (tools.build(tools.tiny(tied_embeddings=tie)) for tie in (True, False))
    names = [name for name, _ in tied.named_parameters()]
    assert not [name for name in names if name.startswith("head")]
    with torch.no_grad():
        untied.head.weight.copy_(tied.embedding.weight)
    tokens_BT = tools.draw(20)
    torch.testing.assert_close(tools.run(tied, tokens_BT)[0], tools.run(untied, tokens_BT)[0])


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_memory_stays_fp32_under_bf16(update, tools):
    model = tools.build(tools.tiny(attention=InfiniConfig(segment_tokens=8, update=update))).to(torch.bfloat16)
    logits_BTV, state = tools.run(model, tools.draw(40))
    assert logits_BTV.dtype == torch.float32
    for layer in state:
        assert {leaf.dtype for leaf in layer.memory} == {torch.float32}
        assert layer.recent.k_BKRD.dtype == torch.bfloat16
    wide = tools.run(tools.build(tools.tiny(attention=InfiniConfig(segment_tokens=8, update=update))), tools.draw(40))[
        0
    ]
    assert (logits_BTV - wide).abs().mean() < 0.05 * wide.abs().mean()
