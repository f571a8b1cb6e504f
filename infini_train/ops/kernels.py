"""Kernels of other packages in the place of a form of this one: used only where they do the same."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)
Kernel = TypeVar("Kernel", bound=Callable[..., Any])
Run = Callable[..., tuple[Tensor, Sequence[Tensor]]]  # of leaves: a loss, and what is compared beside its gradients


def admit(
    name: str, load: Callable[[], Kernel], compare: Callable[[Kernel], float], tolerance: float, other: str
) -> Kernel | None:
    """The kernel, if it is near enough to the other form; one that is not, or fails, is told and left alone.

    Args:
        name: of the kernel, in a warning.
        load: gives it.
        compare: its largest relative error.
        tolerance: what that may be.
        other: names what it was compared with.
    """
    try:
        kernel = load()
        error = compare(kernel)
    except Exception as problem:  # noqa: BLE001 (of a compiler, a driver, another version: a run goes on without it)
        LOG.warning("warning: %s is not used: %s", name, problem)
        return None
    if error <= tolerance:  # not so for NaN
        return kernel
    told = "warning: %s is not used: on a test it is %.2g of the values away from %s, which may be %s"
    LOG.warning(told, name, error, other, tolerance)
    return None


def largest_error(expected: Run, found: Run, drawn: Sequence[Tensor]) -> float:
    """The largest relative error of one run's outputs, and gradients of all that is drawn; NaN if anything is."""
    results: list[list[Tensor]] = []
    for run in (expected, found):
        # Nothing of it is counted by activation checkpointing, in which the first call may lie.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            leaves = [x.clone().requires_grad_() for x in drawn]
            loss, outs = run(*leaves)
            results.append([x.detach() for x in (*outs, *torch.autograd.grad(loss, leaves))])
    errors = [(a - b).double().norm() / b.double().norm() for b, a in zip(*results, strict=True)]
    return torch.stack(errors).max().item()
