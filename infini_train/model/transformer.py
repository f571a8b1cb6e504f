"""The decoder: embedding, layers, final norm, head.

Hidden states are (T, B, D), as megatron-core's sequence parallelism needs.

Legend: T tokens, B lanes, D hidden size, V vocabulary.
"""

from typing import cast

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infini_train.config.model import ModelConfig
from infini_train.model.layers import Embedding, FeedForward, Head, Lesson, Norm, enter_parallel, parallel_config
from infini_train.model.mixer import SequenceMixer, State
from infini_train.model.stages import Stage
from infini_train.model.variants import build_mixer, mixer_class
from infini_train.ops.grid import Grid, Grids, Layout, make_grid
from infini_train.ops.ranks import Ranks
from infini_train.ops.state import name_leaves
from infini_train.ops.varlen import Kernel, find_kernel

IGNORED = -100  # label of a position without a target
ModelState = tuple[State | None, ...]  # of each layer; None for one that carries nothing


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None, number: int) -> None:
        super().__init__()
        self.norm_attention = _norm(config, parallel)
        self.attention = build_mixer(config, parallel, ranks, number)
        self.norm_feed_forward = _norm(config, parallel)
        self.feed_forward = FeedForward(config.hidden_size, config.ffn_size, parallel)

    def forward(self, hidden_TBD: Tensor, state: State | None, grid: Grid) -> tuple[Tensor, State]:
        """Hidden and state after the layer."""
        mixed_TBD, state = self.attention(self.norm_attention(hidden_TBD), state, grid)
        hidden_TBD = hidden_TBD + mixed_TBD
        return hidden_TBD + self.feed_forward(self.norm_feed_forward(hidden_TBD)), state

    def attend_fully(self, hidden_TBD: Tensor, grid: Grid) -> Tensor:
        """Hidden after the layer with full attention; see `SequenceMixer.attend_fully`."""
        hidden_TBD = hidden_TBD + self.attention.attend_fully(self.norm_attention(hidden_TBD), grid)
        return hidden_TBD + self.feed_forward(self.norm_feed_forward(hidden_TBD))

    def prefill(self, hidden_TBD: Tensor, state: State | None, grid: Grid) -> State:
        """The state after the layer, without its output."""
        return self.attention.prefill(self.norm_attention(hidden_TBD), state, grid)


class Transformer(nn.Module):
    """A decoder-only language model whose attention is one of the variants, or one pipeline stage of it.

    Args:
        config: shapes and attention variant.
        parallel: megatron-core's layer settings; None: fp32 defaults.
        stage: which layers; None: the whole model. Parameters keep their global names.
        ranks: how memory crosses ranks of one sequence; None: one rank.
        recompute_layers: keep only each layer's input for backward and compute the layer again.
    """

    def __init__(
        self,
        config: ModelConfig,
        parallel: ModelParallelConfig | None = None,
        *,
        stage: Stage | None = None,
        ranks: Ranks | None = None,
        recompute_layers: bool = False,
    ) -> None:
        super().__init__()
        self.parallel = parallel = parallel or parallel_config()
        self.stage = stage = stage or Stage(0, config.num_layers)
        self.config = config
        self.recompute_layers = recompute_layers
        if stage.embeds:
            self.embedding = Embedding(config.vocab_size, config.hidden_size, parallel)
        self.memory_tokens = mixer_class(config.layers[0]).around_stack(config, parallel)
        numbers = range(stage.first_layer, stage.last_layer)
        self.layers = nn.ModuleDict({str(number): DecoderLayer(config, parallel, ranks, number) for number in numbers})
        if stage.predicts:
            self.norm_final = _norm(config, parallel)
            self.head = Head(config.vocab_size, config.hidden_size, parallel, tied=config.tied_embeddings)

    def initial_state(self, lanes: int) -> ModelState | None:
        """The state before the first token of these lanes; None if no layer carries anything between windows."""
        like = next(self.parameters())
        state = tuple(mixer.initial_state(lanes, like) for mixer in self.mixers())
        for layer_state in state:  # what it declares is checked now, not at the first checkpoint
            list(name_leaves(layer_state, "state"))
        return _whole(state)

    def make_grids(
        self,
        starts_BT: Tensor,
        weights_BT: Tensor,
        state: ModelState | None,
        shard: tuple[int, int] = (0, 1),
        known: Grids | None = None,
        segment_tokens: int | None = None,
    ) -> Grids:
        """This call cut into segments, once for all layers that cut it alike; cheapest with both marks on the host.

        With `shard`, (rank, ranks) of context parallelism, the marks are those of the whole window. Those of another
        stage for the same call are reused if `known`. `segment_tokens` takes the place of the length of all layers that
        have segments; the state must then lie at a segment's edge.
        """
        kernel = self._find_kernel()
        found: dict[Layout, Grid] = {} if known is None else dict(zip(*known, strict=True))
        for mixer, layer_state in zip(self.mixers(), state or (None,) * len(self.layers), strict=True):
            if mixer.layout not in found:
                recent = None if layer_state is None else mixer.recent(layer_state)
                segment, overlap, sinks = mixer.layout
                segment = segment_tokens if segment and segment_tokens else segment
                layout = segment, overlap, shard, sinks
                found[mixer.layout] = make_grid(starts_BT, weights_BT, recent, *layout, kernel=kernel)
        return Grids(tuple(found), tuple(found.values()))

    def _find_kernel(self) -> Kernel | None:
        """What attends to runs, if there is something for these heads, and nothing around the stack asks for a mask."""
        weight = next(self.parameters())
        if self.memory_tokens is not None:
            return None
        return find_kernel(weight.device, weight.dtype, self.config.key_dim, self.config.value_dim)

    def forward(
        self,
        inputs: Tensor,
        grids: Grids,
        state: ModelState | None,
        labels_BT: Tensor | None,
        factors_BT: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Losses of the tokens of one call; a stage that doesn't predict gives its hidden states instead.

        Args:
            inputs: tokens_BT (int64 ids); hidden_TBD of the stage before for one that doesn't embed.
            grids: of this call, on the parameters' device.
            state: what earlier calls left, or None before the first token.
            labels_BT: int64 targets, `IGNORED` where there is none.
            factors_BT: of the losses in the sum whose gradient is wanted, fp32; None: no gradient is.
            lesson: what a teacher says of these tokens, if it has a part in the loss; with `factors_BT`.

        Returns:
            Cross-entropy in nats, and the state after the call. Without `factors_BT` that of each token, loss_BT (fp32,
            0 where ignored), and it has no gradient; with them the sum of all losses times these. With a lesson three
            sums: what has a gradient, the losses, and the divergence from the teacher (`distillation.taught_loss`).
        """
        hidden_TBD, state = self.decode(inputs, grids, state)
        if not self.stage.predicts:
            return hidden_TBD, state
        assert labels_BT is not None
        return self.losses(hidden_TBD, labels_BT, factors_BT, lesson), state

    @torch.no_grad()
    def teach(self, tokens_BT: Tensor, starts_BT: Tensor, shard: tuple[int, int], share: float) -> Lesson:
        """What these weights with full attention over a window make of it, for a whole model.

        Each token sees all before it of its document and window.

        Args:
            tokens_BT: as of `forward`.
            starts_BT: as of `make_grids`, and `shard` too.
            shard: see there.
            share: of the loss.
        """
        grid = make_grid(starts_BT, torch.ones(starts_BT.shape), None, None, 0, shard, kernel=self._find_kernel())
        grid, hidden_TBD = grid.to(tokens_BT.device), self._enter(tokens_BT)
        for layer in self._layers():
            hidden_TBD = layer.attend_fully(hidden_TBD, grid)
        return Lesson(self._finish(hidden_TBD), share)

    def decode(self, inputs: Tensor, grids: Grids, state: ModelState | None) -> tuple[Tensor, ModelState]:
        """hidden_TBD after the last layer (before the final norm), and the state after the call."""
        hidden_TBD = self._enter(inputs)
        if self.memory_tokens is None:
            return self._run_layers(hidden_TBD, grids, state, self._layers())
        (layout,), (grid,) = grids

        def run(hidden_TBD: Tensor, grid: Grid, state: ModelState | None) -> tuple[Tensor, ModelState]:
            return self._run_layers(hidden_TBD, Grids((layout,), (grid,)), state, self._layers())

        return self.memory_tokens(run, self.norm_final, hidden_TBD, grid, state)

    def prefill(self, tokens_BT: Tensor, grids: Grids, state: ModelState | None) -> ModelState:
        """The state that `decode` leaves after tokens that predict nothing: a prompt is read without its last outputs.

        For a whole model. Saves what the last layer would compute for the head: all but the keys and values; nothing
        where the state is made of its outputs.
        """
        if self.memory_tokens is not None:
            return self.decode(tokens_BT, grids, state)[1]
        *lower, last = self._layers()
        below, last_state = (None, None) if state is None else (state[:-1], state[-1])
        hidden_TBD, states = self._run_layers(self._enter(tokens_BT), grids, below, lower)
        return (*states, last.prefill(hidden_TBD, last_state, grids.of(last.attention.layout)))

    def _enter(self, inputs: Tensor) -> Tensor:
        return self.embedding(inputs) if self.stage.embeds else inputs

    def _run_layers(
        self, hidden_TBD: Tensor, grids: Grids, state: ModelState | None, layers: list[DecoderLayer]
    ) -> tuple[Tensor, ModelState]:
        states = []
        for layer, layer_state in zip(layers, state or (None,) * len(layers), strict=True):
            grid = grids.of(layer.attention.layout)
            if self.recompute_layers and torch.is_grad_enabled():
                hidden_TBD, layer_state = checkpoint(
                    layer, hidden_TBD, layer_state, grid, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_TBD, layer_state = layer(hidden_TBD, layer_state, grid)
            states.append(layer_state)
        return hidden_TBD, tuple(states)

    def losses(
        self, hidden_TBD: Tensor, labels_BT: Tensor, factors_BT: Tensor | None = None, lesson: Lesson | None = None
    ) -> Tensor:
        """The losses that `forward` gives, of what `decode` gave."""
        return self.head(self._finish(hidden_TBD), labels_BT, factors_BT, self._tied(), lesson)

    def logits(self, hidden_TBD: Tensor) -> Tensor:
        """logits_TBV in fp32 (this rank's part of the vocabulary), of all these tokens at once: for few of them."""
        return self.head.logits(self._finish(hidden_TBD), self._tied())

    def _finish(self, hidden_TBD: Tensor) -> Tensor:
        return enter_parallel(self.norm_final(hidden_TBD), self.parallel)

    def _tied(self) -> Tensor | None:
        return self.embedding.weight if self.config.tied_embeddings else None

    def carry_over(self, state: ModelState) -> ModelState | None:
        """What is carried from one window of training to the next, detached; None if no layer carries anything."""
        return _whole(
            tuple(mixer.carry_over(layer_state) for mixer, layer_state in zip(self.mixers(), state, strict=True))
        )

    def _layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.layers.values()))

    def mixers(self) -> list[SequenceMixer]:
        """The attention of each layer."""
        return [layer.attention for layer in self._layers()]


def _whole(state: ModelState) -> ModelState | None:
    return None if all(layer_state is None for layer_state in state) else state


def _norm(config: ModelConfig, parallel: ModelParallelConfig) -> Norm:
    return Norm(config.hidden_size, config.norm_eps, parallel.params_dtype, divided=parallel.sequence_parallel)
