"""The memory through a kernel of flash-linear-attention's meaning against plain loops; the kernel itself needs CUDA."""

import functools
import inspect
import sys
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.utils.checkpoint

from infini_train.ops import attention, fla_kernels, reference
from infini_train.ops.fla_kernels import compare_with_chunks, find_kernel
from infini_train.ops.gated_delta import GatedMemory
from infini_train.ops.gated_reference import GatedInputs
from tests.ops.gated_draws import SHAPES, draw, gradients, results, without_entering


def documented_kernel(q, k, v, *, g, beta, initial_state, cu_seqlens, **wanted):
    """What fla's chunk_gated_delta_rule is documented to compute, token by token: (1, T, H, D) and (N, H, D, E)."""
    assert (
        wanted == {"scale": 1.0, "output_final_state": True}
        and q.shape[0] == 1
        and len(initial_state) == len(cu_seqlens) - 1
    )
    outs, finals = [], []
    for number, (first, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        state_HDE = initial_state[number]
        for t in range(first, stop):
            k_HD1 = k[0, t, ..., None]
            state_HDE = state_HDE * g[0, t].exp()[:, None, None]
            written_HE = beta[0, t, :, None] * (v[0, t] - (k_HD1 * state_HDE).sum(1))
            state_HDE = state_HDE + k_HD1 * written_HE[:, None]
            outs.append(torch.einsum("hd,hde->he", q[0, t], state_HDE))
        finals.append(state_HDE)
    return torch.stack(outs)[None], torch.stack(finals)


@pytest.fixture
def with_kernel(monkeypatch):
    monkeypatch.setattr(attention, "find_kernel", lambda k_BSKRD, initial: documented_kernel)


@pytest.mark.usefixtures("with_kernel")
@pytest.mark.parametrize("start_share", [0.0, 0.12, 0.6])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_kernel_gives_what_the_reference_gives(ops, shape, start_share):
    """Weights, documents, grouped queries, a carried memory, open segments."""
    given = draw("token", seed=20, start_share=start_share, **shape)
    fast, slow = (without_entering(results(*f()), "token") for f in (given.attend, given.attend_by_reference))
    ops.assert_same(fast, slow)
    ops.assert_same(gradients(given, fast), gradients(given, slow))


@pytest.mark.usefixtures("with_kernel")
@pytest.mark.parametrize("places", [(4,), (3, 5), (6, 7, 13)])
def test_the_kernel_goes_on_from_any_place(ops, places):
    given = draw("token", tokens=14, kv_heads=1, overlap_tokens=1, seed=22, start_share=0.15)
    pieces, slow = results(*given.attend_in_pieces(*places)), results(*given.attend_by_reference())
    pieces, slow = without_entering(pieces, "token"), without_entering(slow, "token")
    ops.assert_same(pieces, slow)
    ops.assert_same(gradients(given, pieces), gradients(given, slow))


@pytest.mark.usefixtures("with_kernel")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("start_share", [0.0, 0.1])
def test_the_kernels_maps_compose_over_ranks(ops, start_share, ranks):
    given = draw("token", heads=4, tokens=24, overlap_tokens=2, value_size=3, seed=26, start_share=start_share)
    slow = without_entering(results(*given.attend_by_reference()), "token")
    found = ops.on_ranks(ranks, lambda rank, crossing: given.attend(None, (rank, ranks), crossing))
    joined = torch.cat([out for out, _ in found], 2)
    for _, state in found:
        ops.assert_same(without_entering(results(joined, state), "token"), slow)
    ops.assert_same(gradients(given, results(joined, found[0][1])), gradients(given, slow))


@pytest.mark.parametrize("read", ["segment", "token"])
def test_the_kernel_is_for_reads_by_token_in_half_precision_on_cuda(read, monkeypatch):
    monkeypatch.setattr(fla_kernels, "_load", lambda device, key_dim, value_dim: documented_kernel)
    k_BSKRD = torch.empty(2, 3, 2, 32, 4, dtype=torch.bfloat16, device="meta")
    memory = draw(read).memory
    assert find_kernel(k_BSKRD, memory) is None  # not on CUDA

    class OnCuda(NamedTuple):
        shape: tuple[int, ...] = (2, 3, 2, 32, 4)
        dtype: torch.dtype = torch.bfloat16
        is_cuda: bool = True
        device: torch.device = torch.device("cuda")

    assert find_kernel(OnCuda(), memory) is (documented_kernel if read == "token" else None)
    for other in ({"dtype": torch.float32}, {"shape": (2, 2, 2, 32, 4)}, {"shape": (2, 3, 2, 32, 512)}):
        assert find_kernel(OnCuda(**other), memory) is None


def install(monkeypatch, kernel):
    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = kernel
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fla_kernels, "_load", functools.cache(inspect.unwrap(fla_kernels._load)))


def in_half_precision(q, k, v, **given):
    out, finals = documented_kernel(q.float(), k.float(), v.float(), **given)
    return out.to(q.dtype), finals


def away(q, k, v, **given):
    out, finals = in_half_precision(q, k, v, **given)
    return 1.2 * out, finals


def without_gradient(q, k, v, **given):
    out, finals = in_half_precision(q, k, v, **given)
    k.register_hook(lambda gradient: gradient * float("nan"))
    return out, finals


def broken(*_, **__):
    raise RuntimeError("no driver")


@pytest.mark.parametrize(
    ("kernel", "warning"),
    [
        (in_half_precision, None),
        (away, "on a test it is 0."),
        (without_gradient, "on a test it is nan of the values away"),
        (broken, "the installed flash-linear-attention is not used: no driver"),
    ],
)
def test_an_installed_kernel_is_used_only_if_it_does_what_is_expected(monkeypatch, caplog, kernel, warning):
    install(monkeypatch, kernel)
    found = fla_kernels._load(torch.device("cpu"), 16, 24)
    assert found is (None if warning else kernel)
    assert warning in caplog.text if warning else not caplog.text
    if kernel in (in_half_precision, away):
        exact = compare_with_chunks(kernel, torch.device("cpu"), torch.float32, 16, 24)
        assert exact > 0.15 if warning else exact < 1e-5


def test_the_comparison_may_lie_inside_a_layer_that_is_computed_again(monkeypatch):
    """Activation checkpointing counts what is saved; the second time, nothing is compared."""
    install(monkeypatch, in_half_precision)
    x = torch.ones(3, requires_grad=True)

    def layer(x):
        assert fla_kernels._load(torch.device("cpu"), 16, 16) is in_half_precision
        return (x * x).sum()

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


@pytest.mark.gpu
def test_the_kernel_on_cuda_stays_within_rounding():
    """Never run so far: the kernel itself against the form in fp32, where both are there."""
    kernel = fla_kernels._load(torch.device("cuda"), 64, 64)
    if kernel is None:
        pytest.skip("needs flash-linear-attention")
    given = draw("token", tokens=256, segment_tokens=64, key_size=64, value_size=64, seed=4, start_share=0.02)

    def to(x, dtype):
        return None if x is None else x.detach().to("cuda", dtype)

    inputs = given.inputs._replace(
        **{name: to(getattr(given.inputs, name), torch.bfloat16) for name in GatedInputs._fields}
    )
    low = given._replace(
        inputs=inputs,
        logits=tuple(to(x, torch.float32) for x in given.logits),
        memory=GatedMemory(*(to(x, torch.float32) for x in given.memory)),
        marks=reference.Marks(*(mark.cuda() for mark in given.marks)),
    )
    out, state = low.attend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "find_kernel", lambda k_BSKRD, initial: None)
        expected, right = low.attend()
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    found, memory = state.memory.memory_BKDE, right.memory.memory_BKDE
    assert (found - memory).abs().max() < 0.02 * memory.abs().max()
