"""One window of random inputs, run through the fast form and through the reference.

Shapes as in infini_train/ops/reference.py: B rows, H query heads, K key-value heads, T tokens,
D key size, E value size.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from infini_train.ops import reference
from infini_train.ops.attention import InfiniState, infini_attention
from infini_train.ops.grid import make_grid, no_recent
from infini_train.ops.memory import Form, Memory
from infini_train.ops.rope import Rope


def form_of(update: str) -> Form:
    """The form of a name that the fixture `update` gives."""
    return Form(*update.split())


class Thread:
    """One of several ranks that run as threads and meet in shared lists. The graph crosses them as it is."""

    def __init__(self, rank, barrier, places):
        self.rank, self.barrier, self.places = rank, barrier, places

    def _meet(self, mine):
        self.barrier.wait()
        self.places[self.rank] = mine
        self.barrier.wait()
        return list(self.places)

    def gather(self, mine):
        everyones = torch.stack(self._meet(mine))
        return lambda: everyones

    def from_left(self, mine):
        theirs = self._meet(mine)
        left = torch.zeros_like(mine) if self.rank == 0 else theirs[self.rank - 1]
        return lambda: left

    def from_last(self, mine):
        last = self._meet(mine)[-1].detach()
        return lambda: last


def on_ranks(ranks: int, work: Callable[[int, Thread], Any]) -> list[Any]:
    """What `work(rank, crossing)` gives on each of so many ranks; where one fails, none waits for it."""
    barrier, places = threading.Barrier(ranks, timeout=60), [None] * ranks

    def run(rank: int) -> Any:
        try:
            return work(rank, Thread(rank, barrier, places))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


class Shape(NamedTuple):
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    tokens: int = 12
    segment_tokens: int = 4
    key_size: int = 4
    value_size: int = 4
    overlap_tokens: int = 0


class Window(NamedTuple):
    """The inputs of one call. Weights are multiples of 1/4: the fast form keeps them in fp32."""

    shape: Shape
    q_BHTD: Tensor
    k_BKTD: Tensor
    v_BKTE: Tensor
    beta_H: Tensor
    starts_BT: Tensor
    weights_BT: Tensor
    memory: Memory  # initial

    def leaves(self) -> dict[str, Tensor]:
        """Everything that has a gradient."""
        names = ("q", "k", "v", "beta", "memory", "normaliser")
        return dict(zip(names, (*self[1:5], *self.memory[:2]), strict=True))

    def replace_leaves(self, **leaves: Tensor) -> "Window":
        q, k, v, beta, memory, normaliser = (self.leaves() | leaves).values()
        memory = self.memory._replace(memory_BKDE=memory, normaliser_BKD=normaliser)
        return self._replace(q_BHTD=q, k_BKTD=k, v_BKTE=v, beta_H=beta, memory=memory)

    def with_fresh_leaves(self) -> "Window":
        """The same window; gradients are collected anew."""
        return self.replace_leaves(**{name: x.detach().clone().requires_grad_() for name, x in self.leaves().items()})

    def to(self, target: torch.dtype | str) -> "Window":
        """Activations in another dtype, or all on another device; memory and gates never below fp32."""
        wide = torch.promote_types(target, torch.float32) if isinstance(target, torch.dtype) else target
        parts = {name: x.to(target if name in "qkv" else wide) for name, x in self.leaves().items()}
        window = self.replace_leaves(**parts)
        if isinstance(target, str):
            window = window._replace(starts_BT=self.starts_BT.to(target), weights_BT=self.weights_BT.to(target))
        return window._replace(memory=window.memory._replace(written_B=self.memory.written_B.to(wide)))

    def take(self, tokens: slice) -> "Window":
        """A run of the tokens."""
        q, k, v = (x[:, :, tokens] for x in self[1:4])
        marks = self.starts_BT[:, tokens], self.weights_BT[:, tokens]
        shape = self.shape._replace(tokens=q.shape[2])
        return Window(shape, q, k, v, self.beta_H, *marks, self.memory)

    def rows(self, index: Tensor) -> "Window":
        """Some rows of the batch, in any order."""
        q, k, v, starts, weights = (x[index] for x in (*self[1:4], self.starts_BT, self.weights_BT))
        memory = Memory(*(x[index] for x in self.memory))
        return Window(self.shape._replace(batch=len(index)), q, k, v, self.beta_H, starts, weights, memory)

    def cut(self, *places: int) -> list["Window"]:
        edges = [0, *places, self.shape.tokens]
        return [self.take(slice(*pair)) for pair in zip(edges[:-1], edges[1:], strict=True)]

    def first_state(self) -> InfiniState:
        """The initial memory, before any token."""
        k_shape = (self.shape.batch, self.shape.kv_heads, self.shape.key_size)
        return InfiniState(
            self.memory, no_recent(k_shape, self.shape.value_size, self.shape.overlap_tokens, self.k_BKTD)
        )

    def attend(self, update: str, state: InfiniState | None = None) -> tuple[Tensor, InfiniState]:
        """The fast form, from `state` or from the initial memory."""
        state = state or self.first_state()
        sizes = self.shape.segment_tokens, self.shape.overlap_tokens
        grid = make_grid(self.starts_BT, self.weights_BT, state.recent, *sizes)
        return infini_attention(*self[1:5], state, grid, form=form_of(update), rope=Rope(100.0))

    def attend_in_pieces(self, update: str, places: Iterable[int]) -> tuple[Tensor, InfiniState]:
        """The fast form, cut at some places and carried on; the outputs joined."""
        outs, state = [], None
        for piece in self.cut(*places):
            out, state = piece.attend(update, state)
            outs.append(out)
        return torch.cat(outs, dim=2), state

    def attend_by_reference(
        self, update: str, memory: reference.ReferenceMemory | None = None
    ) -> tuple[Tensor, reference.ReferenceMemory]:
        """The reference, from `memory` or from the initial one."""
        if memory is None:
            memory = reference.empty_memory(self.k_BKTD, self.v_BKTE)._replace(**self.memory._asdict())
        kind, sizes = form_of(update), (self.shape.segment_tokens, self.shape.overlap_tokens)
        form = reference.Form(sizes[0], kind.update, sizes[1], Rope(100.0), kind.features)
        return reference.attend(*self[1:5], reference.Marks(self.starts_BT, self.weights_BT), memory, form)


def draw_window(shape: Shape, seed: int = 0, start_share: float = 0.15, filled: bool = True) -> Window:
    """Random inputs in float64. The first row enters with a filled memory (if `filled`), every other row does."""
    source = torch.Generator().manual_seed(seed)
    batch, kv_heads, tokens = shape.batch, shape.kv_heads, shape.tokens

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=source, dtype=torch.float64)

    q = normal(batch, shape.heads, tokens, shape.key_size)
    k = normal(batch, kv_heads, tokens, shape.key_size)
    v = normal(batch, kv_heads, tokens, shape.value_size)
    starts = torch.rand(batch, tokens, generator=source) < start_share
    weights = torch.tensor([0, 0.25, 1, 1, 2.5])[torch.randint(5, (batch, tokens), generator=source)]
    written = 3.0 * (torch.arange(batch) % 2 == 0).double() * filled
    memory = normal(batch, kv_heads, shape.key_size, shape.value_size) * (written > 0)[:, None, None, None]
    normaliser = (normal(batch, kv_heads, shape.key_size).abs() + 0.5) * (written > 0)[:, None, None]
    weights = weights if start_share else torch.ones_like(weights)
    return Window(shape, q, k, v, normal(shape.heads), starts, weights.double(), Memory(memory, normaliser, written))


def state_tensors(out_BHTE: Tensor, state: InfiniState | reference.ReferenceMemory) -> dict[str, Tensor]:
    """All that a call returns, by name."""
    fast = isinstance(state, InfiniState)
    memory = state.memory if fast else Memory(*state[:3])
    k, v = state.recent[:2] if fast else (state.recent_k_BKRD, state.recent_v_BKRE)
    return {"out": out_BHTE, **memory._asdict(), "recent_k": k, "recent_v": v}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal to within `tolerance` of each tensor's largest number. Places before the first token may differ."""
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        left = actual[name]
        if name.startswith("recent"):
            left = left[:, :, left.shape[2] - right.shape[2] :]
        scale = max(1.0, right.detach().abs().max().item()) if right.numel() else 1.0
        torch.testing.assert_close(
            left, right, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(window: Window, results: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a random scalar function of all results with respect to every leaf; 0 where there is none."""
    source = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for name in ("out", "memory_BKDE", "normaliser_BKD"):
        direction = torch.randn(results[name].shape, generator=source, dtype=torch.float64)
        total = total + (direction * results[name]).sum()
    leaves = window.leaves()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


class Tools(NamedTuple):
    """What the tests of this room share."""

    Shape: type[Shape] = Shape
    form_of: Callable[[str], Form] = form_of
    draw: Callable[..., Window] = draw_window
    tensors: Callable[..., dict[str, Tensor]] = state_tensors
    assert_same: Callable[..., None] = assert_same
    gradients: Callable[..., dict[str, Tensor]] = gradients
    on_ranks: Callable[..., list[Any]] = on_ranks


@pytest.fixture(scope="session")
def ops() -> Tools:
    return Tools()


@pytest.fixture(scope="session", params=["linear", "delta", "linear sharp", "delta sharp"])
def update(request: pytest.FixtureRequest) -> str:
    return request.param
