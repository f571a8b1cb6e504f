"""DeepSpeed's ZeRO engine behind a small interface: forward, backward, step, and its state as named pieces.

The only importer of deepspeed.
"""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor, nn

from infini_train.config.parallel import BUCKET_ELEMENTS, ParallelConfig
from infini_train.config.training import OptimConfig
from infini_train.parallel import device
from infini_train.parallel.mesh import ModelParallelUnit

with device.without_compiler():  # DeepSpeed imports it to see that an optimizer is none of these
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401

# Building this table would try the machine's compiler on each of DeepSpeed's ops, and on CPU a shared-memory collective
# would be compiled at the first start; gloo does not need it.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
# The trainer reports skipped steps together with their documents; DeepSpeed's own line adds nothing.
logging.getLogger("DeepSpeed").addFilter(lambda record: "OVERFLOW!" not in record.getMessage())

STATES = ("master", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, in fp32


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

    Gradients are averaged over the data- and context-parallel ranks: scale the loss by their number for a sum. A step
    with non-finite gradients changes nothing and returns a non-finite norm.

    Args:
        model: this rank's part of the model, in fp32 on the device; cast to bf16 here if `precision` says so. Its
            attribute `before_backward`, if any, is set to the function to call when a micro-batch's backward begins.
        named: its parameters by their global names.
        groups: AdamW parameter groups; one that `sleeps` may have the rate 0 at first, see `begin`.
        optim: AdamW's settings, and the global gradient norm above which gradients are scaled down.
        parallel: ZeRO stage, offload.
        precision: "fp32" or "bf16".
        micro_batch_lanes: lanes in one forward (DeepSpeed asks for it; nothing is derived from it).
    """

    def __init__(
        self,
        model: nn.Module,
        named: Iterable[tuple[str, nn.Parameter]],
        groups: list[dict[str, Any]],
        *,
        optim: OptimConfig,
        parallel: ParallelConfig,
        precision: str,
        micro_batch_lanes: int,
    ) -> None:
        self.names = {parameter: name for name, parameter in named}
        # ZeRO-1 would sum the gradients of micro-batches in bf16, or print memory statistics to sum them in fp32.
        self.stage = 2 if precision == "bf16" and parallel.zero_stage == 1 else parallel.zero_stage
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": False, "reduce_bucket_size": BUCKET_ELEMENTS}
        if parallel.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_lanes,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # the trainer decides when a step ends
            "gradient_clipping": optim.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # it would compile DeepSpeed's own for minutes
            "zero_optimization": zero,
            "bf16": {"enabled": precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "timers": {"throughput": {"enabled": False}},  # they wait for the device in each forward
        }
        self._asleep: set[str] = set()
        for group in groups:
            for parameter in group["params"] if group["sleeps"] else ():
                parameter.register_hook(functools.partial(self._hide_if_asleep, group["name"]))
        # DeepSpeed copies its masters after the cast to bf16; they have to start from the fp32 weights, bit for bit.
        trained = [parameter for parameter in self.names if parameter.requires_grad]
        given = {p: p.detach().to("cpu", copy=True) for p in trained} if precision == "bf16" else {}
        adamw = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, mpu=ModelParallelUnit())
        if hasattr(model, "before_backward"):
            # DeepSpeed resets this flag in each forward only, but a pipeline runs several forwards before a backward.
            model.before_backward = self._zero.clear_backward_seen_flag
        masters = [shard for shard in self.shards() if shard.kind == "master"] if given else []
        for shard in masters:
            shard.values.copy_(given[shard.parameter].flatten()[shard.flat_start :][: shard.values.numel()])

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward, through DeepSpeed. Gradients of its result add up until `step`."""
        return self._engine(*inputs)

    def begin(self, lr_of_group: dict[str, float]) -> None:
        """Before the first backward of a step with these rates: a group that `sleeps` has no gradients at rate 0.

        Its moments then stay zeros, and the norm by which gradients are clipped does not know it.
        """
        self._asleep = {group for group, rate in lr_of_group.items() if rate == 0}

    def _hide_if_asleep(self, group: str, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if group in self._asleep else gradient

    def rates(self) -> dict[str, float]:
        """The learning rate of each group of this rank, as of the last step."""
        return {group["name"]: group["lr"] for group in self._zero.param_groups}

    def step(self, lr_of_group: dict[str, float]) -> float:
        """Clips, applies AdamW with these rates (by group name), clears gradients; returns the norm before clipping."""
        for group in self._zero.param_groups:
            group["lr"] = lr_of_group[group["name"]]
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def skip(self) -> None:
        """Drops the gradients instead of a `step`; all ranks call it together.

        DeepSpeed skips a step whose gradient norm is not finite, so an infinite norm is injected to force a skip.
        """
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        norm: Any = [torch.tensor(torch.inf)] if self.stage == 3 else torch.tensor(torch.inf)
        setattr(self._zero, name, lambda: norm)
        self._engine.step()
        delattr(self._zero, name)

    def close(self) -> None:
        """Releases hooks and buffers, so that another engine can be built in this process."""
        self._engine.destroy()

    def gathered(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager[object]:
        """A context in which these parameters hold their full values; all ranks enter it together."""
        return deepspeed.zero.GatheredParameters(list(parameters)) if self.stage == 3 else contextlib.nullcontext()

    def shards(self) -> Iterator[Shard]:
        """This rank's fp32 masters and moments, as views into DeepSpeed's flat buffers."""
        for flat, parameter, offset, flat_start, numel in self._pieces():
            state = self._adam_state(flat)
            for kind in STATES:
                buffer = flat if kind == "master" else state[kind]
                values = buffer.detach().narrow(0, offset, numel)
                yield Shard(self.names[parameter], parameter, kind, flat_start, values)

    def optimizer_steps(self) -> int:
        """AdamW's step counter (bias correction)."""
        return max(int(self._adam_state(flat)["step"]) for flat in self._flat_groups())

    def restore(self, fill: Iterable[tuple[Shard, Tensor]], optimizer_steps: int) -> None:
        """Copies loaded values into their shards, sets AdamW's step counter, and refreshes weights from the masters."""
        for shard, values in fill:
            shard.values.copy_(values)
        for flat in self._flat_groups():
            self._adam_state(flat)["step"].fill_(optimizer_steps)
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        with torch.no_grad():
            for number in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(number)
        if self._zero.persistent_parameters:  # small ones, which DeepSpeed keeps unpartitioned on every rank
            self._zero.persistent_parameters[0].partition(self._zero.persistent_parameters)
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _flat_groups(self) -> list[Tensor]:
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _pieces(self) -> Iterator[tuple[Tensor, nn.Parameter, int, int, int]]:
        """(flat group, parameter, offset in the group, offset in the parameter, elements) of all this rank holds."""
        zero = self._zero
        if self.stage == 3:
            for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
                offset = 0
                for parameter in group:
                    size = parameter.partition_numel()  # the last ranks' parts are padded
                    start = size * ModelParallelUnit.get_data_parallel_rank()
                    numel = min(size, parameter.ds_numel - start)
                    if numel > 0:
                        yield flat, parameter, offset, start, numel
                    offset += size
            return
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # otherwise it lies entirely on another rank
                    where = mapping.get_hp_fragment_address()
                    yield flat, parameter, where.start, mapping.lp_fragment_address.start, where.numel

    def _adam_state(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a flat group; torch initialises it lazily at the first step, with these same values."""
        state = self._zero.optimizer.state[flat]
        if not state:
            step = torch.tensor(0.0, device=flat.device)  # there, or AdamW's fused kernel refuses it
            state.update(step=step, exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
        return state
