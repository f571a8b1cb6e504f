"""The two chains against plain loops in float64: states, gradients, and what torch's library asks of an op."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from infini_train.ops.chain import affine_chain, gated_chain

P, N, D, X = 3, 5, 4, 6


def draw(chunks: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of the affine chain, and of the gated one: (P, D, X) first, then coefficients by chunk."""
    random = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random, dtype=torch.float64) / 2).requires_grad_()

    affine = [leaf(P, D, X), leaf(chunks, P, D, D), leaf(chunks, P, D, X)]
    gated = [leaf(P, D, X), leaf(chunks, P, N, X), leaf(chunks, P, N, D), leaf(chunks, P, D, N), leaf(chunks, P)]
    return affine, gated


def loop_affine(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    states = [start]
    for chunk in range(len(a)):
        states.append(a[chunk] @ states[-1] + b[chunk])
    return torch.stack(states)


def loop_gated(start: Tensor, u: Tensor, w: Tensor, out: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    states, written = [start], []
    for chunk in range(len(u)):
        written.append(u[chunk] - w[chunk] @ states[-1])
        states.append(keep[chunk, :, None, None] * states[-1] + out[chunk] @ written[-1])
    return torch.stack(states), torch.stack(written)


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_states_and_gradients_are_those_of_a_loop(chunks: int) -> None:
    for chain, loop, leaves in zip((affine_chain, gated_chain), (loop_affine, loop_gated), draw(chunks), strict=True):
        found, expected = chain(*leaves), loop(*leaves)
        torch.testing.assert_close(found, expected)
        weights = [torch.randn_like(part) for part in (expected if isinstance(expected, tuple) else (expected,))]

        def total(outs: Tensor | tuple[Tensor, ...], weights: list[Tensor] = weights) -> Tensor:
            outs = outs if isinstance(outs, tuple) else (outs,)
            return sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))

        gradients = torch.autograd.grad(total(found), leaves)
        for one, other in zip(gradients, torch.autograd.grad(total(expected), leaves), strict=True):
            torch.testing.assert_close(one, other)


def test_gradients_where_only_one_result_is_used() -> None:
    _, leaves = draw(3)
    for which in (0, 1):
        found = torch.autograd.grad(gated_chain(*leaves)[which].square().sum(), leaves)
        expected = torch.autograd.grad(loop_gated(*leaves)[which].square().sum(), leaves)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chain", [affine_chain, gated_chain])
def test_it_is_an_op_that_compilers_can_trust(chain) -> None:
    affine, gated = draw(3)
    torch.library.opcheck(chain, tuple(affine if chain is affine_chain else gated))


def test_its_operations_are_counted() -> None:
    """As those of the loops: the recurrence alone in backward, since the rest is not in the op."""
    for chain, loop, leaves in zip((affine_chain, gated_chain), (loop_affine, loop_gated), draw(5), strict=True):
        totals = []
        for function in (chain, loop):
            with FlopCounterMode(display=False) as counter:
                outs = function(*leaves)
                outs = outs if isinstance(outs, tuple) else (outs,)
                sum(out.sum() for out in outs).backward()
            totals.append(counter.get_total_flops())
        assert totals[0] == totals[1] > 0


def test_a_call_is_one_node_whatever_its_length() -> None:
    def count(chunks: int) -> int:
        with torch.profiler.profile() as profile:
            outer = affine_chain(*draw(chunks)[0])
        assert outer.grad_fn is not None
        top = [event for event in profile.events() if event.cpu_parent is None]
        return sum(event.name == "infini_train::affine_chain" for event in top)

    assert count(2) == count(50) == 1
