"""DeepSpeed's ZeRO engine behind a small interface: forward, backward, step, and its state as named pieces.

The only importer of deepspeed.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor, nn

# On CPU DeepSpeed would compile a shared-memory collective with the machine's compiler at the first start; gloo does
# without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STATES = ("master", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter, in fp32


class Shard(NamedTuple):
    """A contiguous piece of a parameter's optimizer state that lies on this rank.

    Offsets count elements of the rank's (tensor-parallel) parameter, flattened row-major. `values` is a view: copy into
    it to load.
    """

    name: str
    parameter: nn.Parameter
    kind: str
    flat_start: int
    values: Tensor


class Engine:
    """A model under DeepSpeed ZeRO with AdamW: fp32, or bf16 weights with fp32 masters, moments and gradient sums.

    A step whose gradients are not finite changes nothing; its norm tells.

    Args:
        model: with parameters in fp32 on the device; cast to bf16 here if `precision` says so.
        groups: AdamW parameter groups.
        precision: "fp32" or "bf16".
        betas: of AdamW.
        eps: of AdamW.
        clip_norm: global gradient norm above which gradients are scaled down.
        micro_batch_lanes: lanes in one forward (DeepSpeed asks for it; nothing is derived from it).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        *,
        precision: str,
        betas: tuple[float, float],
        eps: float,
        clip_norm: float,
        micro_batch_lanes: int,
    ) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        adamw = torch.optim.AdamW(groups, betas=betas, eps=eps)
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_lanes,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # the trainer decides when a step ends
            "gradient_clipping": clip_norm,
            "zero_allow_untested_optimizer": True,
            # ZeRO-1 would sum the gradients of micro-batches in bf16, or print memory statistics to sum them in fp32.
            "zero_optimization": {"stage": 2 if precision == "bf16" else 1, "overlap_comm": False},
            "bf16": {"enabled": precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings)

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward, through DeepSpeed."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this loss; DeepSpeed averages them over data-parallel ranks."""
        self._engine.backward(loss)

    def step(self, lr_of_group: dict[str, float]) -> float:
        """Clips, applies AdamW with these rates (by group name), clears gradients; returns the norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr_of_group[group["name"]]
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def shards(self) -> Iterator[Shard]:
        """This rank's fp32 masters and moments, as views into DeepSpeed's flat buffers."""
        zero = self._engine.optimizer
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            state = self._adam_state(flat)
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:  # lies wholly on another rank
                    continue
                where = mapping.get_hp_fragment_address()
                for kind in STATES:
                    buffer = flat if kind == "master" else state[kind]
                    values = buffer.detach().narrow(0, where.start, where.numel)
                    yield Shard(self.names[parameter], parameter, kind, mapping.lp_fragment_address.start, values)

    def optimizer_steps(self) -> int:
        """AdamW's step counter (bias correction)."""
        return max(
            int(self._adam_state(flat)["step"]) for flat in self._engine.optimizer.single_partition_of_fp32_groups
        )

    def restore(self, fill: Iterable[tuple[Shard, Tensor]], optimizer_steps: int) -> None:
        """Copies loaded values into their shards, sets the step counter, and refreshes the weights from the masters."""
        zero = self._engine.optimizer
        for shard, values in fill:
            shard.values.copy_(values)
        for flat in zero.single_partition_of_fp32_groups:
            self._adam_state(flat)["step"].fill_(optimizer_steps)
        zero.update_lp_params()

    def _adam_state(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a flat group; torch fills it lazily at the first step, with these same values."""
        state = self._engine.optimizer.optimizer.state[flat]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
        return state
