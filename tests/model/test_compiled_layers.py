"""Layers under torch.compile: each is one graph, and what it computes is what it computes uncompiled."""

import pytest
import torch

from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer
from infini_train.model.write_cost import charge_writing
from infini_train.ops import attention, varlen
from tests.ops import test_fla_kernels
from tests.ops.test_varlen import seen

LANES, TOKENS = 2, 40
FAST = ("gated-token",)
OTHERS = ("delta-sharp", "linear-overlap", "memorizing", "rmt", "mixed")  # what is left is made of the same pieces


@pytest.fixture(autouse=True)
def _compiler(process_groups):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model: Transformer, starts_BT: torch.Tensor, *, windows: int = 2) -> list[torch.Tensor]:
    """Losses and gradients of some windows in a row, the memory carried."""
    random, state, found = torch.Generator().manual_seed(1), model.initial_state(LANES), []
    model.zero_grad()
    for _ in range(windows):
        tokens, labels = torch.randint(0, 40, (2, LANES, TOKENS), generator=random)
        grids = model.make_grids(starts_BT, torch.ones(LANES, TOKENS), state)
        loss, following = model(tokens, grids, state, labels, torch.ones(LANES, TOKENS))
        loss.backward()
        found.append(loss.detach())
        state = model.carry_over(following)
    return found + [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "variant",
    [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
    indirect=True,
)
def test_a_layer_is_one_graph_and_computes_the_same(tiny, variant) -> None:
    """By the compiler's own tracing and differentiation; its code for the CPU: tests/train/test_compiling.py."""
    config = tiny(variant)
    model = Transformer(config).double()
    initialise(model, config, seed=0)
    starts_BT = torch.zeros(LANES, TOKENS, dtype=torch.bool)
    starts_BT[0, 13] = True
    expected = run(model, starts_BT)
    for layer in model.layers.values():
        layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(run(model, starts_BT), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_changes_from_step_to_step_compiles_nothing_again(tiny) -> None:
    config = tiny("gated-token")
    model = Transformer(config)
    initialise(model, config, seed=0)
    for layer in model.layers.values():
        layer.compile(dynamic=False, backend="aot_eager")
    none = torch.zeros(LANES, TOKENS, dtype=torch.bool)
    charge_writing([model], 0.1)
    run(model, none)
    torch._dynamo.utils.counters.clear()
    for cost in (0.2, 0.3, 0.4):
        charge_writing([model], cost)
        run(model, none)
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def weigh(q: torch.Tensor, k: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What each query attends to: (heads, queries, keys)."""
    scores = torch.einsum("mhd,xhd->hmx", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen((queries, keys), len(q), len(k)), float("-inf")).softmax(-1)


@torch.library.custom_op("infini_train_tests::varlen", mutates_args=())
def attend_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """What torch's kernel is documented to compute, as an op whose insides a compiler can't see."""
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hmx,xhe->mhe", weigh(q, k, queries, keys), values).contiguous()


@torch.library.custom_op("infini_train_tests::varlen_backward", mutates_args=())
def attend_backward_op(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
) -> Tensors:
    share, group = weigh(q, k, queries, keys), q.shape[1] // k.shape[1]
    of_share = torch.einsum("mhe,xhe->hmx", gradient, v.repeat_interleave(group, 1))
    of_scores = share * (of_share - (share * of_share).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    by_head = (
        torch.einsum("hmx,mhd->xhd", of_scores, q),
        torch.einsum("hmx,mhe->xhe", share, gradient),
    )
    of_k, of_v = (x.unflatten(1, (-1, group)).sum(2) for x in by_head)
    return torch.einsum("hmx,xhd->mhd", of_scores, k.repeat_interleave(group, 1)).contiguous(), of_k, of_v


attend_op.register_fake(lambda q, k, v, queries, keys: q.new_empty(*q.shape[:-1], v.shape[-1]))
attend_backward_op.register_fake(
    lambda gradient, q, k, v, queries, keys: tuple(x.new_empty(x.shape) for x in (q, k, v))
)
attend_op.register_autograd(
    lambda ctx, gradient: (*attend_backward_op(gradient, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def kernel(q, k, v, queries, keys, *longest, window_size, enable_gqa):
    assert longest == (8, 11) and window_size == (-1, 0) and enable_gqa
    return attend_op(q, k, v, queries, keys)


def test_local_attention_by_a_kernel_is_compiled_once_for_windows_of_any_documents(tiny, monkeypatch) -> None:
    """As on CUDA: the kernel comes with the runs, and each window has others."""
    config = tiny("linear-overlap", head_dim=8)
    model = Transformer(config).double()
    initialise(model, config, seed=0)
    windows = torch.zeros(4, LANES, TOKENS, dtype=torch.bool)
    windows[1, 0, 13] = windows[2, 1, [3, 30]] = windows[3, :, 17] = True
    expected = [run(model, starts_BT) for starts_BT in windows]
    monkeypatch.setattr(varlen, "DEVICE", "cpu")
    monkeypatch.setattr(varlen, "DTYPES", (torch.float64,))
    monkeypatch.setattr(varlen, "_load", lambda *_: kernel)
    assert model.make_grids(windows[3], torch.ones(LANES, TOKENS), None).grids[0].runs is not None
    for layer in model.layers.values():
        layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for number, starts_BT in enumerate(windows):
        for found, wanted in zip(run(model, starts_BT), expected[number], strict=True):
            torch.testing.assert_close(found, wanted)
        if number == 0:
            torch._dynamo.utils.counters.clear()
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")


def test_a_fused_memory_is_left_to_its_kernel(tiny, monkeypatch) -> None:
    """As with flash-linear-attention: it is called between two graphs, and no window compiles them again."""
    config = tiny("gated-token")
    model = Transformer(config).double()
    initialise(model, config, seed=0)
    monkeypatch.setattr(attention, "find_kernel", lambda k_BSKRD, initial: test_fla_kernels.documented_kernel)
    windows = torch.zeros(3, LANES, TOKENS, dtype=torch.bool)
    windows[1, 0, 13] = windows[2, 1, [3, 30]] = True
    expected = [run(model, starts_BT) for starts_BT in windows]
    for layer in model.layers.values():
        layer.compile(dynamic=False, backend="aot_eager")
    for number, starts_BT in enumerate(windows):
        for found, wanted in zip(run(model, starts_BT), expected[number], strict=True):
            torch.testing.assert_close(found, wanted)
        if number == 1:  # with and without a mask
            torch._dynamo.utils.counters.clear()
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
