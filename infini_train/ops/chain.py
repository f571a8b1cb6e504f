"""The two recurrences over the chunks of a call, each one op: all else of a memory is computed for all chunks together.

As an op of torch's library, so that autograd keeps one node and not one for each chunk, and so that a compiler neither
unrolls the loop nor depends on its length. Forward runs the chunks in order, backward in the opposite order; the
gradients of the coefficients follow for all chunks at once.

Legend: C chunks, P pairs of lane and key-value head, N tokens a chunk, D key size, X columns of the memory.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula


@custom_op("infini_train::affine_chain", mutates_args=())
def affine_chain(start_PDX: Tensor, a_CPDD: Tensor, b_CPDX: Tensor) -> Tensor:
    """States of M <- A M + B.

    Args:
        start_PDX: state before the first chunk.
        a_CPDD: A of each chunk.
        b_CPDX: B of each chunk.

    Returns:
        (C + 1, P, D, X): the state before each chunk, and after the last.
    """
    states = _room_for_states(start_PDX, len(b_CPDX))
    for a_PDD, b_PDX, (state_PDX, next_PDX) in zip(a_CPDD, b_CPDX, pairwise(states), strict=True):
        torch.baddbmm(b_PDX, a_PDD, state_PDX, out=next_PDX)
    return states


@custom_op("infini_train::affine_chain_backward", mutates_args=())
def _affine_backward(gradient_CPDX: Tensor, a_CPDD: Tensor) -> Tensor:
    """Whole gradient of each state, from what reaches it directly."""
    whole = gradient_CPDX.clone(memory_format=torch.contiguous_format)
    steps = zip(a_CPDD.mT, pairwise(whole), strict=True)
    for a_PDD, (before_PDX, after_PDX) in reversed(list(steps)):
        before_PDX.baddbmm_(a_PDD, after_PDX)
    return whole


@custom_op("infini_train::gated_chain", mutates_args=())
def gated_chain(
    start_PDX: Tensor, u_CPNX: Tensor, w_CPND: Tensor, out_CPDN: Tensor, keep_CP: Tensor
) -> tuple[Tensor, Tensor]:
    """States of Y = U - W M, M <- d M + O Y: what each token of a chunk writes, and the memory that leaves.

    Args:
        start_PDX: state before the first chunk.
        u_CPNX: U of each chunk.
        w_CPND: W.
        out_CPDN: O.
        keep_CP: d.

    Returns:
        (C + 1, P, D, X): the state before each chunk, and after the last; (C, P, N, X): Y.
    """
    states, written = _room_for_states(start_PDX, len(u_CPNX)), torch.empty_like(u_CPNX)
    parts = (u_CPNX, w_CPND, out_CPDN, keep_CP[..., None, None], written, pairwise(states))
    for u_PNX, w_PND, out_PDN, keep_P11, y_PNX, (state_PDX, next_PDX) in zip(*parts, strict=True):
        torch.baddbmm(u_PNX, w_PND, state_PDX, alpha=-1, out=y_PNX)
        torch.mul(state_PDX, keep_P11, out=next_PDX)
        next_PDX.baddbmm_(out_PDN, y_PNX)
    return states, written


@custom_op("infini_train::gated_chain_backward", mutates_args=())
def _gated_backward(
    states_CPDX: Tensor, written_CPNX: Tensor, w_CPND: Tensor, out_CPDN: Tensor, keep_CP: Tensor
) -> tuple[Tensor, Tensor]:
    """Whole gradients of the states and of Y, from what reaches them directly."""
    states, written = (x.clone(memory_format=torch.contiguous_format) for x in (states_CPDX, written_CPNX))
    steps = zip(w_CPND.mT, out_CPDN.mT, keep_CP[..., None, None], written, pairwise(states), strict=True)
    for w_PDN, out_PND, keep_P11, y_PNX, (before_PDX, after_PDX) in reversed(list(steps)):
        y_PNX.baddbmm_(out_PND, after_PDX)
        before_PDX.addcmul_(after_PDX, keep_P11).baddbmm_(w_PDN, y_PNX, alpha=-1)
    return states, written


def _room_for_states(start_PDX: Tensor, chunks: int) -> Tensor:
    states = start_PDX.new_empty(chunks + 1, *start_PDX.shape)
    states[0] = start_PDX
    return states


@affine_chain.register_fake
def _(start_PDX: Tensor, a_CPDD: Tensor, b_CPDX: Tensor) -> Tensor:
    return start_PDX.new_empty(b_CPDX.shape[0] + 1, *start_PDX.shape)


@_affine_backward.register_fake
def _(gradient_CPDX: Tensor, a_CPDD: Tensor) -> Tensor:
    return torch.empty_like(gradient_CPDX, memory_format=torch.contiguous_format)


@gated_chain.register_fake
def _(start_PDX: Tensor, u_CPNX: Tensor, w_CPND: Tensor, out_CPDN: Tensor, keep_CP: Tensor) -> tuple[Tensor, Tensor]:
    return start_PDX.new_empty(u_CPNX.shape[0] + 1, *start_PDX.shape), torch.empty_like(u_CPNX)


@_gated_backward.register_fake
def _(
    states_CPDX: Tensor, written_CPNX: Tensor, w_CPND: Tensor, out_CPDN: Tensor, keep_CP: Tensor
) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(states_CPDX, memory_format=dense), torch.empty_like(written_CPNX, memory_format=dense)


def _keep_affine(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], output)


def _differentiate_affine(ctx: Any, gradient_CPDX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a_CPDD, states_CPDX = ctx.saved_tensors
    whole = _affine_backward(gradient_CPDX, a_CPDD)
    return whole[0], whole[1:] @ states_CPDX[:-1].mT, whole[1:]


def _keep_gated(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:], *output)


def _differentiate_gated(ctx: Any, states_gradient: Tensor, written_gradient: Tensor) -> tuple[Tensor, ...]:
    w_CPND, out_CPDN, keep_CP, states_CPDX, written_CPNX = ctx.saved_tensors
    whole, whole_written = _gated_backward(states_gradient, written_gradient, w_CPND, out_CPDN, keep_CP)
    before, after = states_CPDX[:-1], whole[1:]
    return (
        whole[0],
        whole_written,
        -(whole_written @ before.mT),
        after @ written_CPNX.mT,
        (after * before).sum((-2, -1)),
    )


affine_chain.register_autograd(_differentiate_affine, setup_context=_keep_affine)
gated_chain.register_autograd(_differentiate_gated, setup_context=_keep_gated)


@register_flop_formula([torch.ops.infini_train.affine_chain, torch.ops.infini_train.affine_chain_backward])
def _count_affine(first: Any, a_CPDD: Any, *_: Any, **__: Any) -> int:
    """A multiplication and an addition each, by shapes; `first` is a state, or a state of each chunk."""
    chunks, pairs, key_dim, _ = a_CPDD
    return 2 * chunks * pairs * key_dim**2 * int(first[-1])


@register_flop_formula([torch.ops.infini_train.gated_chain, torch.ops.infini_train.gated_chain_backward])
def _count_gated(first: Any, written_CPNX: Any, w_CPND: Any, *_: Any, **__: Any) -> int:
    return 4 * int(torch.Size(written_CPNX).numel()) * int(w_CPND[-1])
