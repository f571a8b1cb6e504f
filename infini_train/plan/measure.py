"""infini-train plan --measure: what this machine does, as a hardware description.

Matrix products by size, the attention kernel in short and long segments, elementwise operations, the time to start an
operation, and each kind of collective between processes of this machine. Some seconds, and they mean something only if
nothing else runs.
"""

import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import yaml

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.parallel import device
from infini_train.parallel.context import all_gather, reduce_scatter
from infini_train.plan.hardware import LONG_TOKENS, SHORT_TOKENS, Hardware

MATMUL_SIZES = (64, 128, 256, 512, 1024, 2048)
LARGE_SIZES = (256, 512, 1024)  # whose mean is what a model's products reach
GPU_FACTOR = 8  # sizes on a GPU are this much larger
ELEMENTS = 2**24  # of an elementwise operation: 64 MB, more than caches hold
TOKENS, HEADS, HEAD_SIZE = 1024, 8, 64  # that the attention kernel gets, in one segment or several
MESSAGE_ELEMENTS, SMALL_ELEMENTS = 2**18, 2**6  # of a collective: 1 MB, as a layer's on CPU; a GPU's are larger
REPEATS = 5


def best_seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """The shortest of some runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        device.synchronise()
        start = time.perf_counter()
        run()
        device.synchronise()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matmul_rates(dtype: torch.dtype) -> dict[int, float]:
    """Operations a second of square products by size."""
    factor = GPU_FACTOR if device.backend() == "nccl" else 1
    sizes = MATMUL_SIZES if dtype == torch.float32 or factor > 1 else MATMUL_SIZES[:4]  # bf16 on CPU: slow
    rates = {}
    for size in (factor * each for each in sizes):
        a = torch.full((size, size), 1e-3, dtype=dtype, device=device.current())
        rates[size] = 2 * size**3 / best_seconds(lambda a=a: a @ a)  # type: ignore[misc]
    return rates


def attention_rate(dtype: torch.dtype, segment: int) -> float:
    """Operations a second of forward and backward in such segments under a mask, as `tracing.py` counts them."""
    count = TOKENS * (GPU_FACTOR if device.backend() == "nccl" else 1) // segment
    q = torch.randn(count, HEADS, segment, HEAD_SIZE, dtype=dtype, device=device.current(), requires_grad=True)
    mask = torch.ones(count, 1, segment, segment, dtype=torch.bool, device=device.current()).tril()

    def run() -> None:
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()  # type: ignore[no-untyped-call]

    flops = 3.5 * 2 * count * HEADS * segment**2 * 2 * HEAD_SIZE
    return flops / best_seconds(run)


def memory_rate() -> float:
    """Bytes a second of a product of two tensors into a third."""
    a, b, c = (torch.full((ELEMENTS,), 1.0, device=device.current()) for _ in range(3))
    return 3 * 4 * ELEMENTS / best_seconds(lambda: torch.mul(a, b, out=c))


def launch_seconds(count: int = 2000) -> float:
    """Host's time for an operation on next to nothing, with its part of backward."""
    x = torch.ones(8, device=device.current(), requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(count):
            y = y * 1.0
        y.sum().backward()  # type: ignore[no-untyped-call]

    return best_seconds(run, 3) / (2 * count)


def _measure_links(rank: int, processes: int, folder: str) -> None:
    """One of the processes; the first one writes what `measure_links` returns."""
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # only these processes are to reach each other
    device.configure()
    device.set_current()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group(device.backend(), store=store, rank=rank, world_size=processes)
    elements = MESSAGE_ELEMENTS * (GPU_FACTOR**2 if device.backend() == "nccl" else 1) // processes * processes
    small, whole, part = (
        torch.ones(size, device=device.current()) for size in (SMALL_ELEMENTS, elements, elements // processes)
    )
    partner = rank ^ 1

    def seconds(run: Callable[[], object], repeats: int = 4 * REPEATS) -> float:
        dist.barrier()
        return best_seconds(run, repeats)

    def there_and_back() -> None:
        if partner < processes:
            for sends in (True, False) if rank < partner else (False, True):
                (dist.send if sends else dist.recv)(whole, partner)

    latency_s = seconds(lambda: dist.all_reduce(small.mul_(0.5)), 50) / 2  # two messages deep
    share = (processes - 1) / processes * whole.nbytes
    sent: dict[str, tuple[float, int, Callable[[], object]]] = {  # bytes, messages, call
        "all_reduce": (2 * share, 2, lambda: dist.all_reduce(whole.mul_(0.5))),
        "all_gather": (share, 1, lambda: all_gather(whole, part)),
        "reduce_scatter": (share, 1, lambda: reduce_scatter(part, whole)),
        "send": (2 * whole.nbytes, 2, there_and_back),
    }
    rates = {}
    for kind, (sent_bytes, messages, run) in sent.items():
        took = seconds(run)
        rates[kind] = sent_bytes / max(took / 2, took - messages * latency_s)
    if rank == 0:
        Path(folder, "links").write_text(json.dumps([rates, latency_s]))
    dist.destroy_process_group()


def measure_links(processes: int = 2) -> tuple[dict[str, float], float]:
    """(bytes a second of each kind of collective by a ring's formula, seconds of latency) on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure_links, (processes, folder), processes)
        rates, latency_s = json.loads(Path(folder, "links").read_text())
    return rates, latency_s


def measure_hardware() -> tuple[Hardware, dict[str, Any]]:
    """The description, and the rates by size that it is made from. Uses one thread on CPU, as a rank does."""
    torch.set_num_threads(1)
    cuda = device.backend() == "nccl"
    devices = device.count() if cuda else len(os.sched_getaffinity(0))
    rates = {name: matmul_rates(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    trained = rates["bf16" if cuda else "fp32"]
    peak = max(trained.values())
    large = [rate for size, rate in trained.items() if size // (GPU_FACTOR if cuda else 1) in LARGE_SIZES]
    dtype = torch.bfloat16 if cuda else torch.float32
    links, latency_s = measure_links(devices) if devices > 1 else ({"send": memory_rate()}, 1e-6)
    fastest = max(links.values())
    memory_gb = device.memory_bytes() / 1e9 / (1 if cuda else devices)
    described = Hardware(
        name=f"{device.describe()} of {platform.node()}" if cuda else f"core of {platform.node() or 'this machine'}",
        device="cuda" if cuda else "cpu",
        devices_per_node=devices,
        memory_gb=round(memory_gb, 3),
        reserved_gb=round(0.06 * memory_gb, 3),
        bf16_tflops=_significant(max(rates["bf16"].values()) / 1e12),
        fp32_tflops=_significant(max(rates["fp32"].values()) / 1e12),
        matmul_efficiency=_significant(sum(large) / len(large) / peak),
        attention_efficiency=_significant(min(1.0, attention_rate(dtype, LONG_TOKENS) / peak)),
        short_attention_efficiency=_significant(min(1.0, attention_rate(dtype, SHORT_TOKENS) / peak)),
        memory_gb_s=_significant(memory_rate() / 1e9),
        launch_us=_significant(1e6 * launch_seconds()),
        node_gb_s=_significant(fastest / 1e9),
        node_latency_us=_significant(1e6 * latency_s),
        network_gb_s=_significant(fastest / 1e9),
        network_latency_us=_significant(1e6 * latency_s),
        **{f"{kind}_efficiency": _significant(rate / fastest) for kind, rate in links.items()},
    )
    return described, rates


def _significant(value: float) -> float:
    return float(f"{value:.3g}")


def write_hardware(path: Path, hardware: Hardware, rates: dict[str, dict[int, float]]) -> None:
    """A YAML file of it, with the rates by size in a comment.

    Raises:
        ConfigError: the file can't be written.
    """
    lines = ["# Measured by infini-train plan --measure. Other nodes were not reached: network_* repeats node_*."]
    for precision, by_size in rates.items():
        shown = ", ".join(f"{size}: {rate / 1e9:.3g}" for size, rate in by_size.items())
        lines.append(f"# {precision} products, GFLOP/s by size: {shown}")
    text = "\n".join(lines) + "\n" + yaml.safe_dump(dataclasses.asdict(hardware), sort_keys=False)
    try:
        write_atomic(path, text)
    except OSError as error:
        raise ConfigError(f"path: {path} can't be written: {error.strerror}") from error
