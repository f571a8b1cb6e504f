"""The small parts of a decoder layer over megatron-core's parallel linear layers.

Legend: T tokens, B lanes, D hidden size, V vocabulary.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from infini_train.model.parameters import Initial, constant, declare
from infini_train.ops.chunked_loss import Rows, token_losses, weighted_loss
from infini_train.ops.distillation import taught_loss

EMBEDDING = Initial(std=0.02)
MATRIX = Initial()
INTO_RESIDUAL = Initial(into_residual=True)


def parallel_config(dtype: torch.dtype = torch.float32, *, sequence_parallel: bool = False) -> ModelParallelConfig:
    """megatron-core's layer settings: parameters on the default device, filled by `init.initialise`, not by it.

    Args:
        dtype: of the parameters.
        sequence_parallel: hidden states between the parallel layers are divided along T over tensor-parallel ranks.
    """
    return ModelParallelConfig(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
    )


def _no_init(weight: Tensor) -> Tensor:
    raise AssertionError("parameters are filled by model.init.initialise")


def enter_parallel(hidden_TBD: Tensor, parallel: ModelParallelConfig) -> Tensor:
    """Hidden states as the column-parallel layers that follow take them: all tokens on every tensor-parallel rank.

    One collective for all layers that share the input: its gradients are summed once (and scattered, under sequence
    parallelism) instead of once a layer.
    """
    if parallel.tensor_model_parallel_size == 1:
        return hidden_TBD
    group = parallel_state.get_tensor_model_parallel_group()  # not looked up by megatron-core, which a compiler can't
    if parallel.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_TBD, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(hidden_TBD, group=group)


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None, **unused: object) -> Tensor:  # noqa: A002
    """What megatron-core's layers call to multiply; theirs looks up a process group in a way no compiler can trace.

    All else that theirs does is turned off here: gradients are reduced in `enter_parallel` and by ZeRO.
    """
    return F.linear(input, weight, bias)


def column_linear(
    inputs: int, outputs: int, parallel: ModelParallelConfig, *, bias: bool = False, initial: Initial = MATRIX
) -> ColumnParallelLinear:
    """A linear layer whose outputs are divided over the tensor-parallel ranks; its input went `enter_parallel`."""
    linear = ColumnParallelLinear(
        inputs,
        outputs,
        config=replace(parallel, sequence_parallel=False),
        init_method=_no_init,
        bias=bias,
        disable_grad_reduce=True,
    )
    linear._forward_impl = _multiply  # noqa: SLF001 (no public way)
    set_tensor_model_parallel_attributes(linear.weight, True, 0, 1)
    declare(linear.weight, initial)
    if bias:
        declare(linear.bias, constant(0.0))
    return linear


class HeadLinear(nn.Module):
    """A projection to fewer heads than there are tensor-parallel ranks: each rank computes the one head it needs.

    Every rank holds the whole weight, (heads * size, inputs); its gradient is the sum over the tensor-parallel ranks.
    """

    def __init__(self, inputs: int, heads: int, size: int, parallel: ModelParallelConfig, *, bias: bool) -> None:
        super().__init__()
        first = own_head(heads, parallel) * size
        self.rows = slice(first, first + size)
        self.weight = nn.Parameter(torch.empty(heads * size, inputs, dtype=parallel.params_dtype))
        self.bias = nn.Parameter(torch.empty(heads * size, dtype=parallel.params_dtype)) if bias else None
        declare(self.weight, MATRIX)
        if self.bias is not None:
            declare(self.bias, constant(0.0))
        for parameter in self.parameters():
            sum_gradient_over_tensor_ranks(parameter)

    def forward(self, x_TBD: Tensor) -> tuple[Tensor, None]:
        """This rank's head; in the form of megatron-core's layers."""
        bias = None if self.bias is None else self.bias[self.rows]
        return F.linear(x_TBD, self.weight[self.rows], bias), None


def own_head(heads: int, parallel: ModelParallelConfig) -> int:
    """The one that this tensor-parallel rank computes, where there are fewer heads than ranks."""
    return parallel_state.get_tensor_model_parallel_rank() // (parallel.tensor_model_parallel_size // heads)


def head_linear(
    inputs: int, heads: int, size: int, parallel: ModelParallelConfig, *, bias: bool = False
) -> ColumnParallelLinear | HeadLinear:
    """A projection to heads, divided over the tensor-parallel ranks as evenly as there are heads."""
    if heads % parallel.tensor_model_parallel_size == 0:
        return column_linear(inputs, heads * size, parallel, bias=bias)
    return HeadLinear(inputs, heads, size, parallel, bias=bias)


def sum_gradient_over_tensor_ranks(parameter: nn.Parameter) -> None:
    """For a parameter of which every tensor-parallel rank has the same copy but sees another part of the work."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return

    parameter.register_hook(lambda gradient: reduce_from_tensor_model_parallel_region(gradient.contiguous()))


def row_linear(inputs: int, outputs: int, parallel: ModelParallelConfig) -> RowParallelLinear:
    """A linear layer into the residual stream: inputs divided over the tensor-parallel ranks, outputs summed."""
    linear = RowParallelLinear(
        inputs,
        outputs,
        config=parallel,
        init_method=_no_init,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    linear._forward_impl = _multiply  # noqa: SLF001 (no public way)
    set_tensor_model_parallel_attributes(linear.weight, True, 1, 1)
    declare(linear.weight, INTO_RESIDUAL)
    return linear


class Embedding(VocabParallelEmbedding):
    """The token embedding, its rows divided over the tensor-parallel ranks; hidden states of this rank's tokens."""

    def __init__(self, vocab_size: int, hidden_size: int, parallel: ModelParallelConfig) -> None:
        scatter = parallel.sequence_parallel
        super().__init__(
            vocab_size, hidden_size, init_method=_no_init, reduce_scatter_embeddings=scatter, config=parallel
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        declare(self.weight, EMBEDDING)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """hidden_TBD."""
        # megatron-core's layer transposes only where it scatters
        return super().forward(tokens_BT if self.reduce_scatter_embeddings else tokens_BT.t().contiguous())


class Lesson(NamedTuple):
    """A teacher's hidden states before the output projection, as `Head` takes them, and its share of the loss."""

    hidden_TBD: Tensor
    share: float


class Head(nn.Module):
    """The projection to logits, its rows divided over the tensor-parallel ranks, and the loss.

    Its input went `enter_parallel`. With `tied` the weight is the embedding's, handed in at each call.
    """

    def __init__(self, vocab_size: int, hidden_size: int, parallel: ModelParallelConfig, *, tied: bool) -> None:
        super().__init__()
        rows = vocab_size // parallel.tensor_model_parallel_size
        self.first_row = rows * parallel_state.get_tensor_model_parallel_rank()
        self.weight = None if tied else nn.Parameter(torch.empty(rows, hidden_size, dtype=parallel.params_dtype))
        if self.weight is not None:
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
            declare(self.weight, EMBEDDING)

    def forward(
        self,
        hidden_TBD: Tensor,
        labels_BT: Tensor,
        factors_BT: Tensor | None,
        tied: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """loss_BT in nats without gradient; with `factors_BT` the sum of all losses times these, with gradient.

        With a lesson the three sums of `taught_loss`.
        """
        rows = Rows(self._weight(tied), self.first_row, gather_from_tensor_model_parallel_region)
        hidden_ND, labels_N = hidden_TBD.flatten(0, 1), labels_BT.t().flatten()
        if factors_BT is None:
            return token_losses(hidden_ND, rows, labels_N).view(labels_BT.t().shape).t()
        if lesson is None:
            return weighted_loss(hidden_ND, rows, labels_N, factors_BT.t().flatten())
        taught_ND = lesson.hidden_TBD.flatten(0, 1)
        return taught_loss(hidden_ND, taught_ND, rows, labels_N, factors_BT.t().flatten(), lesson.share)

    def logits(self, hidden_TBD: Tensor, tied: Tensor | None = None) -> Tensor:
        """logits_TBV in fp32 of this rank's rows."""
        return F.linear(hidden_TBD, self._weight(tied)).float()

    def _weight(self, tied: Tensor | None) -> Tensor:
        weight_VD = self.weight if tied is None else tied
        assert weight_VD is not None
        return weight_VD


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467); `torch.nn.functional.rms_norm` accumulates in fp32 under 16-bit activations.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
        dtype: of the weight.
        divided: each tensor-parallel rank normalises another part (of the sequence, or its own heads).
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype, *, divided: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        declare(self.weight, constant(1.0))
        self.eps = eps
        if divided:
            sum_gradient_over_tensor_ranks(self.weight)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return F.rms_norm(x_TBD, (x_TBD.shape[-1],), self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, ffn_size: int, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.parallel = parallel
        self.linear_gate = column_linear(hidden_size, ffn_size, parallel)
        self.linear_up = column_linear(hidden_size, ffn_size, parallel)
        self.linear_down = row_linear(ffn_size, hidden_size, parallel)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """Same shape in and out."""
        x_TBD = enter_parallel(x_TBD, self.parallel)
        gate, up = self.linear_gate(x_TBD)[0], self.linear_up(x_TBD)[0]
        return self.linear_down(F.silu(gate) * up)[0]
