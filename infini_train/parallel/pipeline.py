"""Pipeline stages, and micro-batches run through them by megatron-core's schedules.

Only hidden states travel between stages. Each stage, and each virtual stage on a rank, keeps the carried memory of its
own layers for every micro-batch. One process runs the schedule of a single stage.

Legend: B lanes of a micro-batch, T tokens of the whole window (t: of this context-parallel rank).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from infini_train.config.model import ModelConfig
from infini_train.config.parallel import ParallelConfig
from infini_train.data.lanes import Batch
from infini_train.model.layers import parallel_config
from infini_train.model.stages import find_stages
from infini_train.model.transformer import ModelState, Transformer
from infini_train.ops.grid import Grids
from infini_train.parallel import device
from infini_train.parallel.context import ContextRanks
from infini_train.parallel.mesh import Place

StageState = tuple[ModelState | None, ...]  # carried by one stage: a state per micro-batch
Carried = tuple[StageState, ...]  # carried by all stages on this rank
Forward = Callable[..., tuple[Tensor, ModelState]]  # (stage number on this rank, *inputs of Transformer.forward)


class MicroBatch(NamedTuple):
    """Lanes of one forward pass, over the whole window; starts and weights stay on the host, where grids are made."""

    tokens_BT: Tensor
    labels_BT: Tensor
    starts_BT: Tensor
    weights_BT: Tensor
    loss_weights_BT: Tensor


def cut_micro_batches(batch: Batch, count: int) -> list[MicroBatch]:
    """Cuts a batch into micro-batches of consecutive lanes, the same lanes in every window."""
    loss_weights_BT = batch.loss_weights_BT
    if loss_weights_BT is None:
        loss_weights_BT = np.ones(batch.labels_BT.shape, np.float32)
    arrays = (batch.tokens_BT, batch.labels_BT, batch.starts_BT, batch.weights_BT, loss_weights_BT)
    parts = [torch.from_numpy(array).chunk(count) for array in arrays]
    return [MicroBatch(*part) for part in zip(*parts, strict=True)]


class Losses(NamedTuple):
    """Weighted sums over the tokens of this rank's micro-batches, in nats; 0 on stages without the output layer.

    `divergence` is that from the teacher, 0 without one.
    """

    text: float
    divergence: float

    @classmethod
    def of(cls, sums: Sequence[Tensor]) -> "Losses":
        """Of micro-batches, (2,) each; read from the device at once."""
        return cls(*torch.stack(tuple(sums)).double().sum(0).tolist()) if sums else cls(0.0, 0.0)


class Stages(nn.Module):
    """This rank's stages of the model.

    Args:
        model: shapes and attention variant.
        parallel: sizes.
        place: of this rank.
        dtype: of parameters and of the hidden states sent between stages.
        recompute_layers: see `Transformer`.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig | None = None,
        place: Place | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        recompute_layers: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.parallel, self.place = model, parallel or ParallelConfig(), place or Place()
        self.dtype = dtype
        self.before_backward: Callable[[], object] | None = None  # called when a micro-batch's backward begins
        ranks = ContextRanks(parallel_state.get_context_parallel_group()) if self.place.context[1] > 1 else None
        layers = parallel_config(sequence_parallel=self.parallel.sequence_parallel)
        self.stages = nn.ModuleList(
            Transformer(model, layers, stage=stage, ranks=ranks, recompute_layers=recompute_layers)
            for stage in find_stages(model.num_layers, self.parallel, self.place.pipeline[0])
        )
        config = _schedule_config(model, self.parallel, dtype)
        self.slots = [_Slot(number, config) for number in range(len(self.stages))]

    def transformers(self) -> list[Transformer]:
        """The stages, in the order in which a micro-batch passes them."""
        return list(self.stages)  # type: ignore[arg-type]

    def named_globally(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, under the names they have in the whole model."""
        for stage in self.stages:
            yield from stage.named_parameters()

    def forward(self, stage: int, *inputs: Any) -> tuple[Tensor, ModelState]:
        """`Transformer.forward` of the stage with this number."""
        output, state = self.stages[stage](*inputs)
        if self.before_backward is not None and output.requires_grad:
            output.register_hook(lambda _: self._announce_backward())
        return output, state

    def _announce_backward(self) -> None:
        assert self.before_backward is not None
        self.before_backward()

    def initial_carried(self, lanes: int, micro_batches: int, carry_memory: bool = True) -> Carried:
        """The carried memory before the first window."""
        return tuple(
            tuple(stage.initial_state(lanes) if carry_memory else None for _ in range(micro_batches))
            for stage in self.transformers()
        )


class _Slot(nn.Module):
    """A stage as megatron-core's schedules see it: a place for the hidden states that arrive."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, number: int, config: TransformerConfig) -> None:
        super().__init__()
        self.number, self.config = number, config
        self.hidden_TBD: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.hidden_TBD = tensors[0]


def _schedule_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    interleaved = parallel.virtual_stages > 1
    return TransformerConfig(
        num_layers=parallel.pipeline_size * parallel.virtual_stages,  # unused, but must divide evenly
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        tensor_model_parallel_size=parallel.tensor_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if interleaved else None,
        context_parallel_size=parallel.context_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # the loss is already divided by the global count of labels
        # Interleaving with the defaults gave silently wrong losses on gloo, or NaN.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=False,
        batch_p2p_sync=False,
    )


def run_window(
    stages: Stages,
    forward: Forward,
    micro_batches: Sequence[MicroBatch],
    carried: Carried,
    *,
    loss_scale: float | None = None,
    segment_tokens: int | None = None,
    teacher_share: float = 0.0,
    on_phase: Callable[[str, str], None] = lambda phase, detail: None,
) -> tuple[Losses, Carried]:
    """Forward, and backward if `loss_scale` is given, over one window of every lane.

    Args:
        stages: this rank's.
        forward: runs one stage: the engine in training, `stages` itself in evaluation.
        micro_batches: this rank's lanes.
        carried: memory before this window.
        loss_scale: factor on the sum of losses whose gradients are taken; None: no gradients.
        segment_tokens: length of this window's segments; None: the model's.
        teacher_share: see `TeacherConfig`; for a single pipeline stage, with `loss_scale`.
        on_phase: called at the start of "forward" and of "backward" (which includes waiting for other stages).

    Returns:
        What this rank computed itself, and the memory after the window, detached.
    """
    rank, ranks = stages.place.context
    tokens = micro_batches[0].tokens_BT.shape[1] // ranks
    mine = slice(rank * tokens, (rank + 1) * tokens)
    after: list[list[ModelState | None]] = [[None] * len(micro_batches) for _ in carried]
    before = zip(micro_batches, zip(*carried, strict=True), strict=True)
    grids = [_make_grids(stages, batch, states, segment_tokens) for batch, states in before]

    def step(numbers: Iterator[int], slot: _Slot) -> tuple[Tensor, Callable[..., Any]]:
        index = next(numbers)
        which = f"of micro-batch {index + 1} of {len(micro_batches)}"
        on_phase("forward", which)
        stage, batch = stages.transformers()[slot.number], micro_batches[index]
        inputs = batch.tokens_BT[:, mine].to(device.current()) if stage.stage.embeds else slot.hidden_TBD
        labels = batch.labels_BT[:, mine].to(device.current()) if stage.stage.predicts else None
        weights_Bt = batch.loss_weights_BT[:, mine].to(device.current()) if stage.stage.predicts else None
        factors_Bt = None if weights_Bt is None or loss_scale is None else weights_Bt * loss_scale
        lesson = stage.teach(inputs, batch.starts_BT, stages.place.context, teacher_share) if teacher_share else None
        here = grids[index].to(device.current())
        output, state = forward(slot.number, inputs, here, carried[slot.number][index], labels, factors_Bt, lesson)
        after[slot.number][index] = stage.carry_over(state)
        on_phase("backward", which)
        return output, lambda loss: _summed(loss, weights_Bt, loss_scale)

    numbers = [iter(range(len(micro_batches))) for _ in stages.slots]
    sums = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=numbers if len(numbers) > 1 else numbers[0],
        model=stages.slots if len(numbers) > 1 else stages.slots[0],
        num_microbatches=len(micro_batches),
        seq_length=tokens * ranks,
        micro_batch_size=micro_batches[0].tokens_BT.shape[0],
        forward_only=loss_scale is None,
    )
    return Losses.of(sums), tuple(map(tuple, after))


def _make_grids(
    stages: Stages, batch: MicroBatch, states: Sequence[ModelState | None], segment_tokens: int | None
) -> Grids:
    """All stages of this rank read the same marks, so a grid serves all layers of the same layout."""
    grids: Grids | None = None
    for stage, state in zip(stages.transformers(), states, strict=True):
        marks = batch.starts_BT, batch.weights_BT
        grids = stage.make_grids(*marks, state, stages.place.context, grids, segment_tokens)
    assert grids is not None
    return grids


def _summed(loss: Tensor, weights_Bt: Tensor | None, loss_scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(what backward begins with, an unused count, the weighted sums) of a forward's losses, or of their scaled sum."""
    assert weights_Bt is not None
    count = torch.zeros((), dtype=torch.int, device=loss.device)  # the scale contains it
    if loss_scale is None:
        total = (loss * weights_Bt).sum()
        return total, count, torch.stack((total, torch.zeros_like(total)))
    if loss.dim() == 0:
        return loss, count, torch.stack((loss.detach(), torch.zeros_like(loss))) / loss_scale
    return loss[0], count, loss.detach()[1:] / loss_scale
