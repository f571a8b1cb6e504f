"""The small parts of a decoder layer over megatron-core's parallel linear layers.

Legend: T tokens, B lanes, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn


def parallel_config(dtype: torch.dtype = torch.float32) -> ModelParallelConfig:
    """megatron-core's layer settings: parameters on the default device, filled by `init.initialise`, not by it."""
    return ModelParallelConfig(
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def _no_init(weight: Tensor) -> Tensor:
    raise AssertionError("parameters are filled by model.init.initialise")


def column_linear(
    inputs: int, outputs: int, parallel: ModelParallelConfig, *, bias: bool = False
) -> ColumnParallelLinear:
    """A linear layer whose outputs are divided over the tensor-parallel ranks."""
    linear = ColumnParallelLinear(inputs, outputs, config=parallel, init_method=_no_init, bias=bias)
    set_tensor_model_parallel_attributes(linear.weight, True, 0, 1)
    return linear


def row_linear(inputs: int, outputs: int, parallel: ModelParallelConfig) -> RowParallelLinear:
    """A linear layer whose inputs are divided over the tensor-parallel ranks; its outputs are summed."""
    linear = RowParallelLinear(
        inputs,
        outputs,
        config=parallel,
        init_method=_no_init,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    set_tensor_model_parallel_attributes(linear.weight, True, 1, 1)
    return linear


def vocab_embedding(vocab_size: int, hidden_size: int, parallel: ModelParallelConfig) -> VocabParallelEmbedding:
    """The token embedding, its rows divided over the tensor-parallel ranks."""
    embedding = VocabParallelEmbedding(vocab_size, hidden_size, init_method=_no_init, config=parallel)
    set_tensor_model_parallel_attributes(embedding.weight, True, 0, 1)
    return embedding


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467); `torch.nn.functional.rms_norm` accumulates in fp32 under 16-bit activations."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.eps = eps

    def forward(self, x_TBD: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return F.rms_norm(x_TBD, (x_TBD.shape[-1],), self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, ffn_size: int, parallel: ModelParallelConfig) -> None:
        super().__init__()
        self.linear_gate = column_linear(hidden_size, ffn_size, parallel)
        self.linear_up = column_linear(hidden_size, ffn_size, parallel)
        self.linear_down = row_linear(ffn_size, hidden_size, parallel)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """Same shape in and out."""
        gate, up = self.linear_gate(x_TBD)[0], self.linear_up(x_TBD)[0]
        return self.linear_down(F.silu(gate) * up)[0]
