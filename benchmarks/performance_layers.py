"""Attention layers that benchmarks/performance.py times against each other: projections, attention, output projection.

Each is a function of hidden values (1, T, D); all have the same heads, segments and rotary embedding.

Legend: T tokens, D hidden size, H heads.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_train.config.attention import InfiniConfig
from infini_train.config.model import ModelConfig
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer
from infini_train.ops.rope import Rope, rotate

HIDDEN = 512
DOCUMENT_TOKENS = 1500
OTHER_PACKAGE = "infini_transformer_pytorch"
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """What all layers of a comparison have in common."""

    tokens: int
    segment_tokens: int
    head_size: int
    precision: str = "fp32"

    @property
    def heads(self) -> int:
        return HIDDEN // self.head_size

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]

    def draw(self) -> Tensor:
        """Hidden values that want a gradient."""
        values = torch.randn(1, self.tokens, HIDDEN, generator=torch.Generator().manual_seed(0))
        return values.to(self.dtype).requires_grad_()

    def product_flops(self) -> float:
        """Of the matrix products that a forward and a backward of the linear layer can't do without.

        Projections; scores and values of what each query sees, half of its segment on average; the memory, written and
        read. A backward takes twice the products of the forward.
        """
        per_token = 8 * HIDDEN**2 + 2 * HIDDEN * self.segment_tokens + 4 * HIDDEN * self.head_size
        return 3.0 * per_token * self.tokens


def ours(shape: Shape, update: str, *, documents: bool = False, **others: object) -> Layer:
    """The project's layer, with the layout of a window found anew for each pass, as in training."""
    attention = InfiniConfig(segment_tokens=shape.segment_tokens, update=update, **others)  # type: ignore[arg-type]
    config = ModelConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        num_layers=1,
        num_heads=shape.heads,
        ffn_size=16,
        attention=attention,
    )
    model = Transformer(config)
    initialise(model, config, seed=0)
    model.to(shape.dtype)
    mixer = next(iter(model.layers.values())).attention  # type: ignore[union-attr]
    starts = torch.zeros(1, shape.tokens, dtype=torch.bool)
    starts[:, DOCUMENT_TOKENS if documents else shape.tokens :: DOCUMENT_TOKENS] = True

    def run(hidden_1TD: Tensor) -> Tensor:
        grids = model.make_grids(starts, torch.ones(1, shape.tokens), None)
        out_T1D, _ = mixer(hidden_1TD.transpose(0, 1), None, grids.grids[0])
        return out_T1D.transpose(0, 1)

    return run


class PlainLayer(nn.Module):
    """The same in the plainest torch: a loop over segments, or full causal attention; no documents, no padding."""

    def __init__(self, shape: Shape, *, full: bool) -> None:
        super().__init__()
        self.shape, self.full = shape, full
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate_H = nn.Parameter(torch.zeros(shape.heads))
        self.to(shape.dtype)

    def forward(self, hidden_1TD: Tensor) -> Tensor:
        heads = self.qkv(hidden_1TD).unflatten(-1, (3, self.shape.heads, self.shape.head_size))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if self.full:
            found = F.scaled_dot_product_attention(rotate(q, 0, Rope()), rotate(k, 0, Rope()), v, is_causal=True)
        else:
            found = self._loop(q, k, v)
        return self.out(found.transpose(1, 2).flatten(2))

    def _loop(self, q_1HTD: Tensor, k_1HTD: Tensor, v_1HTD: Tensor) -> Tensor:
        size = self.shape.head_size
        memory = q_1HTD.new_zeros(1, self.shape.heads, size, size, dtype=torch.float32)
        norm = q_1HTD.new_zeros(1, self.shape.heads, size, 1, dtype=torch.float32)
        gate, outs = torch.sigmoid(self.gate_H)[:, None, None], []
        segments = zip(*(x.split(self.shape.segment_tokens, 2) for x in (q_1HTD, k_1HTD, v_1HTD)), strict=True)
        for number, (q, k, v) in enumerate(segments):
            local = F.scaled_dot_product_attention(rotate(q, 0, Rope()), rotate(k, 0, Rope()), v, is_causal=True)
            of_q, of_k = F.elu(q) + 1, F.elu(k) + 1
            if number:
                read = (of_q @ memory.to(q.dtype)) / (of_q @ norm.to(q.dtype))
                local = gate * read + (1 - gate) * local
            outs.append(local)
            memory = memory + (of_k.transpose(-1, -2) @ v).float()
            norm = norm + of_k.sum(-2).unsqueeze(-1).float()
        return torch.cat(outs, 2)


def other_package(shape: Shape) -> Layer | None:
    """infini-transformer-pytorch's layer, segment by segment as its wrapper calls it; None where it isn't installed."""
    if importlib.util.find_spec(OTHER_PACKAGE) is None:
        return None
    from infini_transformer_pytorch.infini_transformer import CausalAttention  # type: ignore[import-not-found]

    layer = CausalAttention(HIDDEN, dim_head=shape.head_size, heads=shape.heads).to(shape.dtype)

    def run(hidden_1TD: Tensor) -> Tensor:
        memories, outs = None, []
        for segment in hidden_1TD.split(shape.segment_tokens, 1):
            out, _, memories = layer(segment, past_memories=memories, return_new_memories=True)
            outs.append(out)
        return torch.cat(outs, 1)

    return run


def make_layers(shape: Shape, full_tokens: int) -> dict[str, Layer]:
    """All of them, by name; full attention up to so many tokens."""
    gated = {"read": "token", "read_norm": True}
    layers: dict[str, Layer | None] = {
        "linear": ours(shape, "linear"),
        "linear, documents": ours(shape, "linear", documents=True),
        "delta": ours(shape, "delta"),
        "gated delta": ours(shape, "gated_delta", **gated),
        "plain loop": PlainLayer(shape, full=False),
        "infini-transformer-pytorch": other_package(shape),
        "full attention": PlainLayer(shape, full=True) if shape.tokens <= full_tokens else None,
    }
    return {name: layer for name, layer in layers.items() if layer is not None}
