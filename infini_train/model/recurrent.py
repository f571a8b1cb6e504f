"""The Recurrent Memory Transformer (arXiv 2207.06881, section 3): memory tokens that a segment hands to the next one.

A segment is read as [memory, its tokens, memory]; what the whole stack makes of the memory after it is the memory of
the next segment. So segments run one after the other through all layers, and the loop stands around the stack, not in a
layer (docs/decisions/2026-11-25-recurrent-memory-around-the-stack.md). The layers are those of `local`, on the longer
segment.

Legend: T tokens, B lanes, D hidden size, M memory tokens, t tokens of a segment that lie in this call, J places of a
segment so far: memory, tokens, memory; Q those of them that are computed in this call.
"""

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn

from infini_train.config.attention import RmtConfig
from infini_train.config.model import ModelConfig
from infini_train.model.layers import EMBEDDING
from infini_train.model.local import LocalAttention
from infini_train.model.mixer import Layers, LayerSpec, StackMemory
from infini_train.model.parameters import declare
from infini_train.ops.grid import Grid, Recent
from infini_train.ops.state import Stored


class RmtState(NamedTuple):
    """The state of the first layer: also the memory that the open segment read, or that the next one reads.

    written_B counts the tokens that the document has written into it; where that is 0, the memory is the learned
    initial one, whatever memory_BMD holds. `recent` has the keys and values of the open segment, the memory before it
    included; its marks are those of the tokens alone.
    """

    memory_BMD: Annotated[Tensor, Stored("memory_BMD", "lanes memory_tokens hidden")]
    written_B: Annotated[Tensor, Stored("written_B", "lanes")]
    recent: Annotated[Recent, Stored("recent")]


class MemoryTokens(StackMemory):
    """The learned memory of a document's first segment, and the loop over segments."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig) -> None:
        super().__init__()
        assert isinstance(config.attention, RmtConfig)
        shape = (config.attention.memory_tokens, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=parallel.params_dtype))
        declare(self.weight, EMBEDDING, field="kind")

    def forward(
        self, layers: Layers, norm: nn.Module, hidden_TBD: Tensor, grid: Grid, state: tuple[Any, ...] | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """See `StackMemory.forward`."""
        first_MBD = self.weight[:, None].expand(-1, hidden_TBD.shape[1], -1)
        return decode_segments(layers, norm, first_MBD, hidden_TBD, grid, state)


class RmtAttention(LocalAttention):
    """Attention of one layer inside [memory, tokens, memory]; the first layer's state holds the memory, too."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.attention, RmtConfig)
        self.memory_shape = (spec.attention.memory_tokens, spec.model.hidden_size)
        self.is_first = spec.layer == 0

    @classmethod
    def around_stack(cls, config: ModelConfig, parallel: ModelParallelConfig) -> StackMemory:
        """The memory tokens."""
        return MemoryTokens(config, parallel)

    def recent(self, state: Any) -> Recent:
        """The whole state, but of the first layer."""
        return state.recent if self.is_first else state

    def initial_state(self, lanes: int, like: Tensor) -> Any:
        """Nothing seen yet."""
        recent = super().initial_state(lanes, like)
        if not self.is_first:
            return recent
        return RmtState(like.new_zeros(lanes, *self.memory_shape), recent.weight_BR.new_zeros(lanes), recent)


def decode_segments(
    layers: Layers, norm: nn.Module, first_MBD: Tensor, hidden_TBD: Tensor, grid: Grid, state: tuple[Any, ...] | None
) -> tuple[Tensor, tuple[Any, ...]]:
    """Runs the segments of a call through the stack, each with the memory of the one before.

    Args:
        layers: (hidden_TBD, grid, states) -> (hidden_TBD, states): the stack.
        norm: its final norm, after which the memory is taken, or it would grow from segment to segment.
        first_MBD: the memory of a document that has none yet.
        hidden_TBD: embedded tokens.
        grid: of the call, segments alone.
        state: of all layers, the first an `RmtState`; None before the first token.
    """
    recents: tuple[Recent, ...] | None = None
    memory_MBD, written_B = first_MBD, torch.zeros_like(grid.keep_open_B, dtype=torch.float32)
    if state is not None:
        written_B = state[0].written_B
        memory_MBD = _choose(written_B > 0, state[0].memory_BMD.transpose(0, 1), first_MBD)
        recents = (state[0].recent, *state[1:]) if grid.open_tokens else None
    out, begin = [], 0
    for segment in range(grid.segments):
        stop = min((segment + 1) * grid.segment_tokens - grid.open_tokens, grid.tokens)
        opens, closes = segment > 0 or grid.open_tokens == 0, segment < grid.closed
        if opens:
            recents, goes_on_B = None, grid.reads_BSQ[:, segment, 0]
            memory_MBD, written_B = _choose(goes_on_B, memory_MBD, first_MBD), written_B * goes_on_B
        sees_BtJ = _sees_tokens(grid, segment, stop - begin)
        same_B = sees_BtJ[:, -1, 0]  # no document began after the segment's first token
        parts = [memory_MBD] * opens + [hidden_TBD[begin:stop]]
        parts += [_choose(same_B, memory_MBD, first_MBD)] * closes
        mask_BQJ = _mask(sees_BtJ, len(first_MBD), opens, grid.write_BCN[:, segment] > 0 if closes else None)
        places, carried = mask_BQJ.shape[2], mask_BQJ.shape[2] - mask_BQJ.shape[1]
        inner = grid._replace(
            segment_tokens=places,
            open_tokens=carried,
            tokens=places - carried,
            segments=1,
            closed=0,
            mask_BSQJ=mask_BQJ[:, None],
        )
        mixed_TBD, recents = layers(torch.cat(parts), inner, recents)
        first_token = len(first_MBD) if opens else 0
        out.append(mixed_TBD[first_token : first_token + stop - begin])
        if closes:
            memory_MBD = norm(mixed_TBD[first_token + stop - begin :])
            written_B = written_B * same_B + grid.count_BC[:, segment]
        begin = stop
    assert recents is not None
    if grid.left_open == 0:
        recents = tuple(
            each._replace(k_BKRD=each.k_BKRD[:, :, :0].clone(), v_BKRE=each.v_BKRE[:, :, :0].clone())
            for each in recents
        )
    return torch.cat(out), (RmtState(memory_MBD.transpose(0, 1), written_B, recents[0]), *recents[1:])


def _choose(yes_B: Tensor, first_MBD: Tensor, second_MBD: Tensor) -> Tensor:
    return torch.where(yes_B[:, None], first_MBD, second_MBD)


def _sees_tokens(grid: Grid, segment: int, tokens: int) -> Tensor:
    """(B, t, J): which of the segment's tokens so far each of this call's sees: not later, same document."""
    open_tokens = grid.open_tokens if segment == 0 else 0
    keys = open_tokens + tokens
    if grid.mask_BSQJ is None:
        causal = torch.ones(tokens, keys, dtype=torch.bool, device=grid.keep_open_B.device).tril(open_tokens)
        return causal.expand(len(grid.keep_open_B), -1, -1)
    first = 0 if grid.segments == 1 else open_tokens
    return grid.mask_BSQJ[:, segment, first : first + tokens, :keys]


def _mask(sees_BtJ: Tensor, memory: int, opens: bool, written_BJ: Tensor | None) -> Tensor:
    """(B, Q, J): rows of the memory read (if the segment opens), of the tokens, of the memory written (if it closes).

    Tokens see the memory read by the document that the segment began with. The memory written sees the tokens that are
    to be written, and the memory read if they are of that document.
    """
    lanes, tokens, keys = sees_BtJ.shape
    causal = torch.ones(memory, memory, dtype=torch.bool, device=sees_BtJ.device).tril().expand(lanes, -1, -1)
    after = 0 if written_BJ is None else memory
    rows = [F.pad(causal, (0, keys + after))] if opens else []
    rows.append(F.pad(torch.cat((sees_BtJ[..., :1].expand(-1, -1, memory), sees_BtJ), 2), (0, after)))
    if written_BJ is not None:
        reads = sees_BtJ[:, -1:, :1].expand(-1, memory, memory)
        rows.append(torch.cat((reads, written_BJ[:, None].expand(-1, memory, -1), causal), 2))
    return torch.cat(rows, 1)
