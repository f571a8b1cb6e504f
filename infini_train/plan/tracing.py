"""Runs modules on the meta device and counts what they would do: no values, no memory, no other process.

Every operation passes `Trace`: products by torch's own FLOP formulas, bytes and number of all other operations,
collectives with their group, and the storages that live at each moment. Two kernels have another form on the meta
device than where training runs, so stand-ins take their place: attention, which would fall back to plain products, and
the RMS norm, which is one kernel on CUDA.

Documents are taken to begin inside the windows, as they do in text: the attention kernel computes whole squares under a
mask.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from infini_train.plan.work import Exchange, Work

FLASH_BACKWARD = 2.5  # five products for the forward's two, since the scores are computed again
UNCOUNTED = ("_unsafe_view", "detach")  # views in all but name
LAUNCHES_A_CHUNK = {"affine_chain": 1, "affine_chain_backward": 1, "gated_chain": 3, "gated_chain_backward": 3}
UNMOVED = ("mm",)  # counted by its FLOPs
GATHERS = ("index", "index_select", "gather", "embedding")
SCATTERS = ("index_put_", "_index_put_impl_", "index_add_", "index_copy_", "scatter_", "scatter_add_")
KINDS = {
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "send": "send",
    "broadcast_": "send",
    "alltoall_base_": "send",
    "alltoall_": "send",
}


class Trace(TorchDispatchMode):
    """Counts the operations that run inside it, and follows the storages that they allocate.

    Attributes:
        work: so far.
        saved: `work` as it was when autograd last kept a tensor: recomputation stops there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = self.saved = Work()
        self._events: list[tuple[int, int]] = []  # (storage, bytes allocated or, negative, freed)
        self._sizes: dict[int, int] = {}  # of storages that are alive
        self._left_out: set[int] = set()
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number, which is not used again
        self._groups = {
            group.group_name: name
            for name, group in (
                ("tensor", parallel_state.get_tensor_model_parallel_group()),
                ("context", parallel_state.get_context_parallel_group()),
            )
            if group.size() > 1
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _call(func, args, kwargs)
        given, results = _tensors((*args, *kwargs.values())), _tensors((out,))
        space, name = func._schema.name.split("::")
        if space == "c10d":
            self._count_exchange(name, args, given)
        elif not (name in UNCOUNTED or name.startswith(("empty", "new_empty")) or _is_view(func)):
            flops = 0.0
            if func._overloadpacket in flop_registry:
                flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            moved = 0 if name in UNMOVED else _count_moved(name, given, results)
            self.add(Work(matmul_flops=flops, moved_bytes=moved, launches=_count_launches(name, args)))
        storages = {each.untyped_storage()._cdata for each in given}
        for tensor in results:
            if tensor.untyped_storage()._cdata not in storages:
                self._follow(tensor)
        return out

    def _count_exchange(self, name: str, args: Any, given: list[Tensor]) -> None:
        scripted = [each for each in args if isinstance(each, torch.ScriptObject)]
        groups = [dist.ProcessGroup.unbox(each) for each in scripted if str(each._type()).endswith("ProcessGroup")]
        if not given or not groups or groups[0].group_name not in self._groups:
            return
        key = (self._groups[groups[0].group_name], KINDS.get(name, "send"))
        self.add(Work(exchanges={key: Exchange(1, max(each.nbytes for each in given))}))

    def add(self, work: Work) -> None:
        """Also counts this."""
        self.work += work

    def save(self, tensor: Tensor) -> Tensor:
        """Autograd keeps the tensor."""
        self.saved = self.work
        return tensor

    def _follow(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            number, size = len(self._events), storage.nbytes()
            self._numbers[address] = number
            self._sizes[number] = size
            self._events.append((number, size))
            weakref.finalize(storage, self._free, address, number, size).atexit = False
        return self._numbers[address]

    def _free(self, address: int, number: int, size: int) -> None:
        self._events.append((number, -size))
        self._numbers.pop(address, None)
        self._sizes.pop(number, None)

    def leave_out(self, tensor: Tensor) -> None:
        """Its storage does not count as memory: it is counted elsewhere."""
        self._left_out.add(self._follow(tensor))

    def live_bytes(self) -> int:
        """Bytes of the storages that are alive now."""
        return sum(size for number, size in self._sizes.items() if number not in self._left_out)

    def peak_bytes(self) -> int:
        """The most that was alive at any moment."""
        live = peak = 0
        for number, size in self._events:
            live += 0 if number in self._left_out else size
            peak = max(peak, live)
        return peak


class _Result(NamedTuple):
    """A new tensor, as far as the meta device knows it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


_KNOWN: dict[Any, _Result] = {}  # operation with its operands' outlines -> result
_MOST_KNOWN = 100_000


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operation gives. For operands of the same outlines it runs once, since many run slowly, in Python."""
    key = (func, _outline(args), _outline(tuple(kwargs.items()))) if _is_pure(func) else None
    try:
        known = _KNOWN.get(key)
    except TypeError:  # an operand that can't be hashed
        key = known = None
    if known is not None:
        return torch.empty_strided(known.size, known.stride, dtype=known.dtype, device="meta")
    out = func(*args, **kwargs)
    if key is not None and _is_new(out, _tensors((*args, *kwargs.values()))):
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _Result(tuple(out.shape), out.stride(), out.dtype)
    return out


@functools.cache
def _is_pure(func: Any) -> bool:
    """Whether its schema has it neither write to its operands nor share memory with them."""
    schema = func._schema
    return schema.name.startswith("aten::") and not any(
        each.alias_info for each in (*schema.arguments, *schema.returns)
    )


def _is_new(out: Any, given: list[Tensor]) -> bool:
    """Whether it is one meta tensor with a storage of its own, just as large as it needs."""
    if not isinstance(out, Tensor) or out.device.type != "meta" or out.storage_offset():
        return False
    storage = out.untyped_storage()
    same = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta").untyped_storage()
    return storage.nbytes() == same.nbytes() and all(storage._cdata != each.untyped_storage()._cdata for each in given)


def _outline(value: Any) -> Any:
    """Equal for operands that differ in their values only."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_outline, value))
    return type(value), value  # 1, 1.0 and True are equal


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments or results of an operation, and in lists there."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


@functools.cache
def _is_view(func: Any) -> bool:
    return any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)


def _count_launches(name: str, args: Any) -> int:
    """Kernels of an op: one, but for the chains (ops/chain.py), which run one chunk after the other."""
    return LAUNCHES_A_CHUNK[name] * len(args[1]) if name in LAUNCHES_A_CHUNK else 1


def _count_moved(name: str, given: list[Tensor], results: list[Tensor]) -> int:
    """Bytes of all inputs and outputs; of a tensor that is indexed only what the indices choose."""
    if name in GATHERS:
        return sum(each.nbytes for each in given[1:]) + 2 * results[0].nbytes
    if name in SCATTERS:
        return sum(each.nbytes for each in given[1:]) + given[-1].nbytes
    return sum(each.nbytes for each in (*given, *results))


class _Kernels(TorchFunctionMode):
    """Puts the stand-ins into the place of attention and, on CUDA, of the RMS norm."""

    def __init__(self, trace: Trace, on_cuda: bool) -> None:
        super().__init__()
        self.trace, self.on_cuda = trace, on_cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].dim() == 4:
            return _attend(self, *args, **kwargs)
        if func in (F.rms_norm, torch.rms_norm) and self.on_cuda:
            return _normalise(self.trace, *args, **kwargs)
        return func(*args, **kwargs)

    def allocate(self, like: Tensor, shape: torch.Size) -> Tensor:
        """A result of attention: CUDA's kernels lay tokens out before heads."""
        if self.on_cuda:
            return like.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        return like.new_empty(shape)


def _attend(
    kernels: _Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    return _Attention.apply(query, key, value, attn_mask, is_causal, kernels)  # type: ignore[no-untyped-call, no-any-return]


class _Attention(torch.autograd.Function):
    """One kernel forward and one backward, as flash and memory-efficient attention: scores are never kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, kernels: _Kernels
    ) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(q.dtype)  # the kernels take what is added to the scores
        scores = math.prod(q.shape[:-1]) * k.shape[-2]
        ctx.flops = {k.shape[-2]: 2.0 * scores * (k.shape[-1] + v.shape[-1]) * (0.5 if causal else 1)}
        ctx.kernels = kernels
        kernels.trace.add(Work(attention_flops=ctx.flops, launches=1))
        out = kernels.allocate(q, q.shape[:-1] + v.shape[-1:])
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_rest = ctx.saved_tensors
        ctx.kernels.trace.add(Work(attention_flops=ctx.flops).times(FLASH_BACKWARD) + Work(launches=1))
        return (*(ctx.kernels.allocate(each, each.shape) for each in (q, k, v)), None, None, None)


def _normalise(
    trace: Trace, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _Norm.apply(input, weight, len(normalized_shape), trace)  # type: ignore[no-untyped-call, no-any-return]


class _Norm(torch.autograd.Function):
    """One kernel forward, two backward; keeps its input and a number in fp32 for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int, trace: Trace) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-dims], dtype=torch.float32))
        ctx.trace = trace
        trace.add(Work(moved_bytes=2 * out.nbytes, launches=1))
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _rows = ctx.saved_tensors
        ctx.trace.add(Work(moved_bytes=4 * x.nbytes, launches=2))
        gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
        return gradient, None if weight is None else torch.empty_like(weight), None, None


@contextlib.contextmanager
def tracing(on_cuda: bool, parameters: list[nn.Parameter]) -> Iterator[Trace]:
    """Counts what runs in its scope, inside `device.on_meta`. Gradients of the parameters do not count as memory."""
    trace = Trace()

    def drop(parameter: Tensor) -> None:
        assert parameter.grad is not None
        trace.leave_out(parameter.grad)
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in parameters]
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(trace.save, lambda tensor: tensor),
            _Kernels(trace, on_cuda),
            trace,
        ):
            yield trace
    finally:
        for handle in handles:
            handle.remove()


class Source(torch.autograd.Function):
    """A tensor from elsewhere: allocated here, so that it counts as memory as long as somebody keeps it."""

    @staticmethod
    def forward(ctx: Any, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


class Sink(torch.autograd.Function):
    """Takes a result; its backward allocates the result's gradient, which nobody but autograd keeps."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        ctx.result = (result.shape, result.dtype)
        return result.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shape, dtype = ctx.result
        return gradient.new_empty(shape, dtype=dtype)
