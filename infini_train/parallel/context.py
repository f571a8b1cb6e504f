"""Context parallelism: each rank holds consecutive whole segments of a window, and only memories cross between ranks.

What is transferred: docs/context-parallel.md. Each transfer is started by one autograd node and awaited by another, so
that the computation between the two overlaps with it, in forward and in backward.

Legend: P ranks of the group, ... the shape of what a rank contributes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Names since torch 2.13, where the older ones are deprecated.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ContextRanks:
    """`Ranks` (ops/memory.py) over a process group, gloo or NCCL, in the order of the ranks' shards.

    Attributes:
        sent_bytes: bytes this rank has sent so far, by the formulas of ring collectives over the actual buffers.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent_bytes = 0

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, size), as `make_grid` takes it."""
        return self.rank, self.size

    def gather(self, mine: Tensor) -> Callable[[], Tensor]:
        """See `Ranks.gather`."""
        return _begin(mine, _Gather(self))

    def from_left(self, mine: Tensor) -> Callable[[], Tensor]:
        """See `Ranks.from_left`."""
        return _begin(mine, _FromLeft(self))

    def from_last(self, mine: Tensor) -> Callable[[], Tensor]:
        """See `Ranks.from_last`."""
        shared = mine.detach().clone(memory_format=torch.contiguous_format)
        if self.rank == self.size - 1:
            self.sent_bytes += shared.nbytes
        work = dist.broadcast(shared, group=self.group, group_src=self.size - 1, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return shared

        return finish


class _Transfer(ABC):
    """One transfer and its gradient's transfer back. Holds the buffers while a collective fills them."""

    def __init__(self, ranks: ContextRanks) -> None:
        self.ranks = ranks
        self.work: Any = None
        self.buffers: tuple[Tensor, ...] = ()

    @abstractmethod
    def send(self, mine: Tensor) -> None:
        """Starts filling the last of `buffers` with what this rank receives."""

    @abstractmethod
    def send_back(self, gradient: Tensor) -> None:
        """Starts filling the last of `buffers` with the gradient of what this rank sent."""

    def wait(self) -> Tensor:
        """Waits for the transfer; returns what arrived."""
        self.work.wait()
        *_, arrived = self.buffers
        self.work, self.buffers = None, ()
        return arrived


class _Gather(_Transfer):
    def send(self, mine: Tensor) -> None:
        size = self.ranks.size
        everyones = mine.new_empty(size, *mine.shape)
        self.buffers = (mine, everyones)
        self.ranks.sent_bytes += (size - 1) * mine.nbytes
        self.work = all_gather(everyones.view(-1), mine.view(-1), group=self.ranks.group, async_op=True)

    def send_back(self, gradient: Tensor) -> None:
        mine = torch.empty_like(gradient[0])
        self.buffers = (gradient, mine)
        self.ranks.sent_bytes += (self.ranks.size - 1) * mine.nbytes
        self.work = reduce_scatter(mine.view(-1), gradient.view(-1), group=self.ranks.group, async_op=True)


class _FromLeft(_Transfer):
    def send(self, mine: Tensor) -> None:
        self._pass_on(mine, 1)

    def send_back(self, gradient: Tensor) -> None:
        self._pass_on(gradient, -1)

    def _pass_on(self, mine: Tensor, step: int) -> None:
        """Sends to rank + step and receives from rank - step; zeros where there is no such rank."""
        rank, size = self.ranks.rank, self.ranks.size
        sent, received = [0] * size, [0] * size
        if 0 <= rank + step < size:
            sent[rank + step] = mine.numel()
        if 0 <= rank - step < size:
            received[rank - step] = mine.numel()
        theirs = torch.zeros_like(mine)
        outgoing, incoming = mine.view(-1)[: sum(sent)], theirs.view(-1)[: sum(received)]
        self.buffers = (outgoing, incoming, theirs)
        self.ranks.sent_bytes += outgoing.nbytes
        self.work = dist.all_to_all_single(incoming, outgoing, received, sent, group=self.ranks.group, async_op=True)


def _begin(mine: Tensor, transfer: _Transfer) -> Callable[[], Tensor]:
    pending = _Start.apply(mine.contiguous(), transfer)  # type: ignore[no-untyped-call]
    return lambda: _Finish.apply(pending, transfer)  # type: ignore[no-untyped-call]


class _Start(torch.autograd.Function):
    """Starts the transfer; its output must not be read before `_Finish`. Backward waits for the gradient."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.send(mine)
        return transfer.buffers[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.wait(), None


class _Finish(torch.autograd.Function):
    """Waits for the transfer; backward starts the transfer of the gradient."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return pending.view_as(pending)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.send_back(gradient.contiguous())
        return gradient, None  # used for its shape only: _Start returns what arrives
