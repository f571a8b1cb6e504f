"""Random inputs of a gated delta memory, run through the fast form and through plain loops."""

from typing import NamedTuple

import torch
from torch import Tensor

from infini_train.ops import gated_reference, reference
from infini_train.ops.attention import Additions, InfiniState, infini_attention
from infini_train.ops.gated_delta import GatedMemory, Writing
from infini_train.ops.gated_reference import GatedInputs
from infini_train.ops.grid import make_grid, no_recent
from infini_train.ops.memory import Form
from infini_train.ops.rope import Rope

ROPE = Rope(100.0)
SHAPES = {
    "plain": {},
    "one_token": {"tokens": 1},
    "inside_one_segment": {"tokens": 3},
    "ragged": {"tokens": 14, "segment_tokens": 5},
    "groups_of_two": {"heads": 4, "tokens": 9},
    "one_kv_head_for_three": {"heads": 3, "kv_heads": 1, "batch": 3, "tokens": 8, "overlap_tokens": 1},
    "values_wider_than_keys": {"key_size": 2, "value_size": 5, "tokens": 10},
    "segments_of_one_token": {"segment_tokens": 1, "tokens": 7},
    "overlap_of_a_whole_segment": {"tokens": 11, "segment_tokens": 3, "overlap_tokens": 3},
    "several_chunks_a_segment": {"tokens": 25, "segment_tokens": 11, "heads": 1, "kv_heads": 1},
}


class Draw(NamedTuple):
    """Random inputs of one call, and the memory before it; gradients are asked of all but the marks."""

    inputs: GatedInputs
    logits: tuple[Tensor, Tensor]  # of strength and decay
    marks: reference.Marks
    memory: GatedMemory
    segment_tokens: int
    overlap_tokens: int

    def leaves(self) -> dict[str, Tensor]:
        named = self.inputs._asdict() | dict(zip(("strength", "decay"), self.logits, strict=True))
        named |= {"memory": self.memory.memory_BKDE, "entering": self.memory.entering_BKDE}
        return {name: x for name, x in named.items() if isinstance(x, Tensor) and x.requires_grad}

    def take(self, part: slice, logits: tuple[Tensor, Tensor] | None = None) -> "Draw":
        inputs = self.inputs._replace(
            q_BHTD=self.inputs.q_BHTD[:, :, part],
            k_BKTD=self.inputs.k_BKTD[:, :, part],
            v_BKTE=self.inputs.v_BKTE[:, :, part],
        )
        marks = reference.Marks(*(mark[:, part] for mark in self.marks))
        return self._replace(inputs=inputs, logits=tuple(x[:, :, part] for x in self.logits), marks=marks)

    @property
    def form(self) -> Form:
        return Form("gated_delta", read="token" if self.memory.entering_BKDE is None else "segment")

    @property
    def first(self) -> InfiniState:
        k, v = self.inputs.k_BKTD, self.inputs.v_BKTE
        return InfiniState(self.memory, no_recent((*k.shape[:2], k.shape[3]), v.shape[3], self.overlap_tokens, k))

    def attend(self, state=None, shard=(0, 1), ranks=None):
        """The fast form."""
        state = state or self.first
        grid = make_grid(*self.marks, state.recent, self.segment_tokens, self.overlap_tokens, shard)
        tokens = grid.tokens
        part = slice(shard[0] * tokens, (shard[0] + 1) * tokens) if ranks else slice(None)
        mine = self.take(part)
        return infini_attention(
            *mine.inputs[:3],
            self.inputs.beta_H,
            state,
            grid,
            form=self.form,
            rope=ROPE,
            ranks=ranks,
            additions=mine.additions,
        )

    @property
    def writing(self) -> Writing:
        strength, decay = self.logits
        return Writing(torch.nn.functional.logsigmoid(-strength), torch.nn.functional.logsigmoid(decay))

    @property
    def additions(self) -> Additions:
        weight = self.inputs.norm_E
        norm = None
        if weight is not None:
            norm = lambda x: torch.nn.functional.rms_norm(x, weight.shape, weight, gated_reference.EPS)  # noqa: E731
        return Additions(self.writing, self.inputs.gate_HD, norm)

    def attend_in_pieces(self, *places: int):
        edges = [0, *places, self.inputs.q_BHTD.shape[2]]
        outs, state = [], None
        for pair in zip(edges[:-1], edges[1:], strict=True):
            out, state = self.take(slice(*pair)).attend(state)
            outs.append(out)
        return torch.cat(outs, 2), state

    def attend_by_reference(self, memory=None):
        strength, decay = (torch.sigmoid(x) for x in self.logits)
        inputs = self.inputs._replace(strength_BKT=strength, decay_BKT=decay)
        if memory is None:
            entering = self.memory.memory_BKDE if self.memory.entering_BKDE is None else self.memory.entering_BKDE
            memory = gated_reference.empty_memory(inputs)._replace(
                memory_BKDE=self.memory.memory_BKDE, entering_BKDE=entering, written_B=self.memory.written_B
            )
        form = reference.Form(self.segment_tokens, "linear", self.overlap_tokens, ROPE)
        return gated_reference.attend(inputs, self.marks, memory, form, self.form.read)


def draw(read="token", seed=0, start_share=0.0, plain_additions=False, filled=True, **shape):
    """`shape`: any of the sizes below."""
    sizes = {"batch": 2, "heads": 2, "kv_heads": 2, "tokens": 12, "segment_tokens": 4, "key_size": 4, "value_size": 4}
    batch, heads, kv_heads, tokens, segment_tokens, key_size, value_size, overlap_tokens = (
        {**sizes, "overlap_tokens": 0} | shape
    ).values()
    source = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=source, dtype=torch.float64).requires_grad_()

    q, k = normal(batch, heads, tokens, key_size), normal(batch, kv_heads, tokens, key_size)
    v, beta = normal(batch, kv_heads, tokens, value_size), normal(heads)
    logits = normal(batch, kv_heads, tokens), (2 + normal(batch, kv_heads, tokens)).detach().requires_grad_()
    extra = (None, None) if plain_additions else (normal(heads, key_size), normal(value_size))
    starts = torch.rand(batch, tokens, generator=source) < start_share
    weights = torch.tensor([0, 0.25, 1, 1, 2.5])[torch.randint(5, (batch, tokens), generator=source)]
    weights = weights if start_share else torch.ones_like(weights)
    written = 3.0 * (torch.arange(batch) % 2 == 0).double() * filled
    memory = (normal(batch, kv_heads, key_size, value_size) * (written > 0)[:, None, None, None]).detach()
    memory.requires_grad_()
    state = GatedMemory(memory, memory if read == "segment" else None, written)
    inputs = GatedInputs(q, k, v, *logits, beta, *extra)
    return Draw(inputs, logits, reference.Marks(starts, weights.double()), state, segment_tokens, overlap_tokens)


def results(out, state) -> dict[str, Tensor]:
    if isinstance(state, InfiniState):
        memory, recent = state.memory, state.recent
        entering = memory.memory_BKDE if memory.entering_BKDE is None else memory.entering_BKDE
        return {"out": out, "memory": memory.memory_BKDE, "entering": entering, "written": memory.written_B,
                "recent_k": recent.k_BKRD}  # fmt: skip
    return {"out": out, "memory": state.memory_BKDE, "entering": state.entering_BKDE, "written": state.written_B,
            "recent_k": state.recent_k_BKRD}  # fmt: skip


def gradients(given: Draw, found: dict[str, Tensor], names=("out", "memory")) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    total = sum(
        (torch.randn(found[name].shape, generator=source, dtype=torch.float64) * found[name]).sum() for name in names
    )
    leaves = given.leaves()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def without_entering(found: dict[str, Tensor], read: str) -> dict[str, Tensor]:
    """Where every token reads all before it, there is no other memory."""
    return {name: x for name, x in found.items() if read == "segment" or name != "entering"}
