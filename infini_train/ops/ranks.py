"""How tensors travel between the ranks that hold one window: what ops ask for, without a process group of their own.

Legend: P ranks that hold the window.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """How tensors travel between the ranks that hold one window, each its own shard.

    A call starts a transfer and returns the function that waits for it, so that the computation in between hides it.
    All ranks call the same methods in the same order with tensors of the same shape.
    """

    def gather(self, mine: Tensor) -> Callable[[], Tensor]:
        """Every rank's tensor, (P, ...). Gradients go back to the rank that gave it, summed over all ranks."""
        ...

    def from_left(self, mine: Tensor) -> Callable[[], Tensor]:
        """The left neighbour's tensor; zeros on the first rank. Gradients go back to the neighbour."""
        ...

    def from_last(self, mine: Tensor) -> Callable[[], Tensor]:
        """The last rank's tensor, without gradient."""
        ...
