"""What differs between a machine with CUDA and one without. The only file that may name torch.cuda."""

import logging
import os
import time
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

MATMUL_PROBE_SIZE = 2048


def prepare() -> None:
    """Settings needed before deepspeed and megatron-core are imported; keeps their notices off the user's screen."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
    warnings.filterwarnings("ignore", message=".*pynvml package is deprecated.*")
    warnings.filterwarnings("ignore", module="megatron|deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)


def current() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def backend() -> str:
    """The backend of torch.distributed."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def set_current() -> None:
    """Makes this rank's device the default of CUDA calls; nothing to do on CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(current())


def synchronise() -> None:
    """Waits until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """The most memory this process has used: of the device with CUDA, resident set without."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its maximum survives exec, so that a child of a large process would report its parent's.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def matmul_peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square product, measured now: the ceiling of utilisation."""
    size = MATMUL_PROBE_SIZE * (4 if torch.cuda.is_available() else 1)
    a = torch.full((size, size), 1e-3, dtype=dtype, device=current())  # not random: the generators belong to the run
    best_s = float("inf")
    for _ in range(4):
        synchronise()
        start = time.perf_counter()
        a @ a
        synchronise()
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s


def profiled_activities() -> list[ProfilerActivity]:
    """What torch.profiler can record here."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
