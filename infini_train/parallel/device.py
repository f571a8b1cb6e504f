"""What differs between a machine with CUDA and one without. The only file that may name torch.cuda.

Whether this process computes on a GPU is decided once, by `choose`; which GPU is its own, by `choose_index`.
"""

import contextlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from infini_train.config.errors import ConfigError
from infini_train.environment import read_number, world

LOG = logging.getLogger(__name__)
MATMUL_PROBE_SIZE, MATMUL_FIRST_SIZE = 2048, 256
MATMUL_ENOUGH_S = 0.2
VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_DEVICES = ("", "-1", "NoDevFiles")  # its values that show no GPU; the last is Slurm's
DRIVERS = {"12": "R525", "13": "R580"}  # the first branch of NVIDIA's driver for a major version of CUDA
_uses_cuda: bool | None = None  # None: not decided yet


# ------------------------------------------------------------------------------------------------------ CPU or GPU


class Absence(NamedTuple):
    """Why CUDA can't be used.

    Attributes:
        is_fault: there should be a GPU here, so that nobody expects the CPU in its place.
    """

    reason: str
    is_fault: bool


def choose(wanted: str = "auto") -> bool:
    """Decides, for the rest of this process, whether it computes on a GPU.

    Args:
        wanted: "cpu"; "cuda"; "auto": on a GPU where there is one.

    Raises:
        ConfigError: "cuda", and there is no GPU that can be used; "auto", and there is one, but it can't be used.
    """
    global _uses_cuda
    if wanted == "cpu":
        os.environ[VISIBLE] = ""  # for libraries that look for themselves
        _uses_cuda = False
        return False
    absence = find_absence()
    if absence is not None and (wanted == "cuda" or absence.is_fault):
        raise ConfigError(
            f"device: {wanted}: {absence.reason}; to use the CPU: --set device=cpu or"
            f" --device cpu, or {VISIBLE}= where a command has neither"
        )
    if absence is not None and torch.version.cuda is None and find_signs() and world()[0] == 0:
        LOG.warning("warning: device: %s: %s; the CPU is used", wanted, absence.reason)
    _uses_cuda = absence is None
    return _uses_cuda


def uses_cuda() -> bool:
    """Whether this process computes on a GPU."""
    return choose() if _uses_cuda is None else _uses_cuda


def find_absence() -> Absence | None:
    """Why CUDA can't be used here; None if it can."""
    with warnings.catch_warnings(record=True) as said:  # torch says what it has against a driver once in a process
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    return explain_absence(torch.version.cuda, find_signs(), [str(each.message) for each in said])


def explain_absence(cuda: str | None, signs: Sequence[str], said: Sequence[str]) -> Absence:
    """What to tell of CUDA that can't be used.

    Args:
        cuda: the version that torch was built with.
        signs: of a GPU.
        said: torch's warnings.
    """
    if cuda is None:
        build = f"torch {torch.__version__} is a build without CUDA"
        return Absence(f"{build}; for GPUs: make install CONSTRAINTS=constraints-cuda.txt", False)
    if not signs:
        hidden = os.environ.get(VISIBLE)
        if hidden is not None:
            return Absence(f"{VISIBLE}={hidden} hides all GPUs; unset it, or ask Slurm for GPUs", False)
        return Absence("no GPU is to be seen; start it on a node that has some, and a container with its driver", False)
    detail = f" ({' '.join(said[0].split())[:160]})" if said else ""
    driver = DRIVERS.get(cuda.split(".")[0])
    needed = f"CUDA {cuda} needs driver {driver} or later, " if driver else ""
    return Absence(
        f"torch can use no GPU, though there should be one, by {', '.join(signs)}{detail}: a fault of the driver, or of"
        f" what a container or a job shows of it; {needed}see nvidia-smi and docs/slurm.md, Drivers and CUDA",
        True,
    )


def find_signs() -> list[str]:
    """What says that this process should have a GPU, whether or not it works."""
    visible = os.environ.get(VISIBLE)
    if visible is not None and visible.strip() in NO_DEVICES:
        return []
    signs = [str(file) for file in sorted(Path("/dev").glob("nvidia[0-9]*"))[:1]]
    signs += ["nvidia-smi"] * (shutil.which("nvidia-smi") is not None)
    return signs + [VISIBLE] * (visible is not None)


# ---------------------------------------------------------------------------------------------------------- libraries


def configure(wanted: str = "auto") -> None:
    """Applies settings needed before deepspeed and megatron-core are imported, and silences their notices.

    Raises:
        ConfigError: see `choose`.
    """
    if not choose(wanted):
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


def prepare(wanted: str = "auto") -> None:
    """Imports megatron-core after `configure`; call it before importing anything that builds a model."""
    configure(wanted)
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


# ------------------------------------------------------------------------------------------------------ this rank's GPU


def choose_index(local_rank: int, local_ranks: int | None, gpus: int) -> int:
    """The number of a rank's GPU among those that it sees; NCCL does not support several ranks on one.

    Args:
        local_rank: its number among the ranks of its machine.
        local_ranks: these ranks, where that is known (--nproc, torchrun); None: srun may show each its own GPU alone.
        gpus: GPUs that this rank sees.

    Raises:
        ConfigError: there are more ranks than GPUs.
    """
    if gpus == 1 and (local_ranks is None or is_shown_one()):
        return 0
    if local_ranks is not None and local_ranks > gpus:
        raise ConfigError(
            f"--nproc: {local_ranks} processes need as many GPUs, and this machine shows {gpus}; start {gpus}"
        )
    if local_rank >= gpus:
        raise ConfigError(
            f"LOCAL_RANK: is {local_rank}, so there are at least {local_rank + 1} processes on this machine, but each"
            f" sees {gpus} GPUs; start {gpus} on a machine (tasks_per_node), or show each its own (--gpus-per-task=1)"
        )
    return local_rank


def current() -> torch.device:
    """The device of this rank."""
    if not uses_cuda():
        return torch.device("cpu")
    local_ranks = read_number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else None
    return torch.device("cuda", choose_index(read_number("LOCAL_RANK", 0), local_ranks, count()))


def set_current() -> None:
    """Makes this rank's device the default of CUDA calls and of DeepSpeed; nothing to do on CPU.

    Raises:
        ConfigError: more ranks were started on this machine than it has GPUs.
    """
    if uses_cuda():
        index = current().index
        torch.cuda.set_device(index)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes it for the number of the GPU
        # It plans anew for each shape, which takes tenths of a second, and generation has a new one each token.
        torch.backends.cuda.enable_cudnn_sdp(False)


def backend() -> str:
    """The backend of torch.distributed."""
    return "nccl" if uses_cuda() else "gloo"


def describe() -> str:
    """Name of this rank's device, with CUDA and NCCL versions."""
    if not uses_cuda():
        return "CPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{torch.cuda.get_device_name(current())} (CUDA {torch.version.cuda}, NCCL {nccl})"


def identify() -> str:
    """What tells this rank's GPU from all others; empty on CPU."""
    return str(torch.cuda.get_device_properties(current()).uuid) if uses_cuda() else ""


def is_shown_one() -> bool:
    """Whether this process was given a single GPU, as a task of srun --gpus-per-task=1 is."""
    shown = os.environ.get(VISIBLE, "")
    return "," not in shown and shown not in NO_DEVICES


def count() -> int:
    """Number of GPUs visible to this process."""
    return torch.cuda.device_count() if uses_cuda() else 0


# -------------------------------------------------------------------------------------------- one program for both


def stand_in_for_cuda() -> None:
    """Without CUDA: redirects to the CPU the few CUDA calls that megatron-core makes on every machine."""
    if uses_cuda() or getattr(torch.cuda, "_infini_train_stand_in", False):
        return
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    schedules.torch = _TorchOnCpu()  # type: ignore[assignment]
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


class _TorchOnCpu:
    """torch, for a module that names the device "cuda" where it makes a counter. Nothing else is called through it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **{**options, "device": "cpu"})


def synchronise() -> None:
    """Waits until the device has finished all submitted work."""
    if uses_cuda():
        torch.cuda.synchronize()


def memory_bytes() -> int:
    """Total memory of this rank's GPU; without CUDA, of the machine."""
    if uses_cuda():
        return torch.cuda.get_device_properties(current()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU; without CUDA, the resident set."""
    if uses_cuda():
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its maximum survives exec, so that a child of a large process would report its parent's.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def matmul_peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, measured now: 100 % of the model FLOP utilisation (MFU).

    Smaller where a large one would take seconds, as in bf16 on a CPU that has no instructions for it.
    """
    largest = MATMUL_PROBE_SIZE * (4 if uses_cuda() else 1)
    size = min(largest, MATMUL_FIRST_SIZE)
    while size < largest and _product_s(size, dtype, 2) < MATMUL_ENOUGH_S:
        size = min(2 * size, largest)
    return 2 * size**3 / _product_s(size, dtype, 4)


def _product_s(size: int, dtype: torch.dtype, times: int) -> float:
    """Seconds of a product, the fastest of some."""
    a = torch.full((size, size), 1e-3, dtype=dtype, device=current())  # random values would advance the generators
    best_s = float("inf")
    for _ in range(times):
        synchronise()
        start = time.perf_counter()
        a @ a
        synchronise()
        best_s = min(best_s, time.perf_counter() - start)
    return best_s


def profiled_activities() -> list[ProfilerActivity]:
    """The activities that torch.profiler can record on this machine."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if uses_cuda() else [])]
