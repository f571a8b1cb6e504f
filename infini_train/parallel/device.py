"""What differs between a machine with CUDA and one without. The only file that may name torch.cuda."""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity

from infini_train.config.errors import ConfigError

MATMUL_PROBE_SIZE = 2048


def configure() -> None:
    """Applies settings needed before deepspeed and megatron-core are imported, and silences their notices."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch.profiler's own notices
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
    warnings.filterwarnings("ignore", message=".*pynvml package is deprecated.*")
    warnings.filterwarnings("ignore", module="megatron|deepspeed")
    # torch 2.13 renamed collectives that megatron-core 0.16 calls by their old names
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)


def prepare() -> None:
    """Imports megatron-core after `configure`; call it before importing anything that builds a model."""
    configure()
    with without_compiler():
        import megatron.core  # noqa: F401


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """A context for imports whose functions are decorated with torch.compile, but never called here.

    The decorator alone loads the compiler, which adds two seconds to each process's start. Code that keeps a reference
    to the decorator (megatron-core's jit_fuser) never compiles in this process.
    """
    compiler = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def current() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local_rank % torch.cuda.device_count())  # srun may show each task its own GPU only
    return torch.device("cpu")


def backend() -> str:
    """The backend of torch.distributed."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def describe() -> str:
    """Name of this rank's device, with CUDA and NCCL versions."""
    if not torch.cuda.is_available():
        return "CPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{torch.cuda.get_device_name(current())} (CUDA {torch.version.cuda}, NCCL {nccl})"


def count() -> int:
    """Number of accelerators visible to this process."""
    return torch.cuda.device_count()


def set_current() -> None:
    """Makes this rank's device the default of CUDA calls; nothing to do on CPU.

    Raises:
        ConfigError: more ranks were started on this machine than it has GPUs.
    """
    if torch.cuda.is_available():
        check_count(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), count())
        torch.cuda.set_device(current())


def check_count(ranks: int, gpus: int) -> None:
    """Refuses several ranks on one GPU, which NCCL does not support.

    (Under srun, which may show each task its own GPU only, LOCAL_WORLD_SIZE is not set.)
    """
    if ranks > gpus:
        raise ConfigError(f"--nproc: {ranks} processes need as many GPUs, and this machine shows {gpus}; start {gpus}")


def stand_in_for_cuda() -> None:
    """Without CUDA: redirects to the CPU the few CUDA calls that megatron-core makes on every machine."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_infini_train_stand_in", False):
        return
    from megatron.core.tensor_parallel import random

    torch.cuda.current_device = current  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda._infini_train_stand_in = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """The meta device is the default one, and the current one of CUDA, where megatron-core allocates its buffers."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device


class _CudaLiteralsToCpu(TorchFunctionMode):
    """Creates tensors on the CPU where "cuda" is requested."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def schedule_scope() -> contextlib.AbstractContextManager[object]:
    """A context for megatron-core's schedules, which name the device "cuda" literally."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaLiteralsToCpu()


def synchronise() -> None:
    """Waits until the device has finished all submitted work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_bytes() -> int:
    """Total memory of this rank's GPU; without CUDA, of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(current()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU; without CUDA, the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its maximum survives exec, so that a child of a large process would report its parent's.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def matmul_peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, measured now: 100 % of the model FLOP utilisation (MFU)."""
    size = MATMUL_PROBE_SIZE * (4 if torch.cuda.is_available() else 1)
    a = torch.full((size, size), 1e-3, dtype=dtype, device=current())  # random values would advance the generators
    best_s = float("inf")
    for _ in range(4):
        synchronise()
        start = time.perf_counter()
        a @ a
        synchronise()
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s


def profiled_activities() -> list[ProfilerActivity]:
    """The activities that torch.profiler can record on this machine."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
