"""How well `infini-train plan` predicts: small runs of this machine, some to calibrate with, others held out.

    python benchmarks/plan.py --seconds 280     # again and again until all is measured; then it reports
    python benchmarks/plan.py --again           # all times once more, and the machine's rates: the shorter time stays
    python benchmarks/plan.py --report          # errors, results/plan/errors.json, the tables of docs/plan.md

A case is a config and a number of processes (plan_cases.py). Its ranks are forked after everything is imported and
train some steps on random tokens whose documents begin anywhere. The time is that of the shortest step (one thread a
rank), the memory the highest resident one above what was there before the model was built (with malloc set to give
every large block back). Measured: results/plan/measured.json. What is there is not measured again, so that the work can
be cut into pieces.

Times need a machine that does nothing else. More ranks than cores share them; such cases are not calibrated with.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from plan_cases import CASES, read, resolve, write
from plan_report import report

from infini_train.config.run import RunConfig

RATES = dict.fromkeys(("matrices", "vectors", "gates"), 1e-3)
STEPS = {"time": 5, "memory": 2}


# ----------------------------------------------------------------------------------------------------- in the processes


def resident_bytes(name: str) -> int:
    """VmRSS, or VmHWM, its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def give_memory_back() -> int:
    """Tells malloc to hand every block above 64 KiB to the kernel; resident bytes afterwards, the new highest."""
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((-3, 1 << 16), (-1, 1 << 16)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(option, value)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def make_batch(config: RunConfig, rank: int) -> Any:
    """Random tokens of this data-parallel rank; a document begins about every one and a half segments."""
    from infini_train.data.lanes import Batch

    source = np.random.default_rng(rank)
    shape = (config.lanes_per_rank, config.train.window_tokens)
    ids = source.integers(0, config.model.vocab_size, shape)
    starts = source.random(shape) < 1 / (1.5 * (config.model.segment_tokens or 128))
    return Batch(ids, ids, starts, np.ones(shape, np.float32), np.zeros(shape[0], np.int64), 0.0)


def run_rank(config: RunConfig, measured: str) -> float:
    """Trains some steps; the shortest time of all but the first, or the peak of memory."""
    from infini_train.parallel import mesh
    from infini_train.train.session import build, empty_carried
    from infini_train.train.step import train_step

    place = mesh.start(config.parallel)
    base = give_memory_back() if measured == "memory" else 0
    stages, engine, _ = build(config, place, None)
    carried, batch = empty_carried(config, stages), make_batch(config, place.data[0])
    times = []
    for _ in range(STEPS[measured]):
        start = time.perf_counter()
        carried = train_step(stages, engine, batch, carried, RATES).states
        times.append(time.perf_counter() - start)
    if measured == "time":
        return mesh.max_over_world(min(times[1:]))
    return mesh.max_over_world(float(resident_bytes("VmHWM") - base))


def run_case(name: str, measured: str) -> float:
    """Forks the case's ranks and waits for them; what rank 0 found."""
    processes = CASES[name]["processes"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    reader, writer = os.pipe()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
            found = run_rank(resolve(name), measured)
            if rank == 0:
                os.write(writer, json.dumps(found).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    if failed:
        sys.exit(f"{name}: {len(failed)} of {processes} ranks failed")
    with os.fdopen(reader) as stream:
        return float(stream.read())


# ---------------------------------------------------------------------------------------------------------- measuring


def wanted(kinds: list[str]) -> list[tuple[str, str]]:
    """Cases and what is still to be measured of them."""
    found = read("measured.json")
    pairs = [(name, kind) for kind in kinds for name in CASES if kind == "memory" or "memory only" not in name]
    return [(name, kind) for name, kind in pairs if kind not in found.get(name, {})]


def measure(missing: list[tuple[str, str]], seconds: float, rates: bool = False) -> None:
    """These cases, until the time is up; of a time that is there already, the shorter one stays.

    `rates`: measure the machine's, too, if they are there already.
    """
    end = time.monotonic() + seconds
    if not missing:
        return
    from infini_train.parallel import device

    device.prepare()
    import torch

    import infini_train.train.session
    import infini_train.train.step  # noqa: F401

    if any(kind == "time" for _, kind in missing) and (rates or not read("measured.json").get("hardware")):
        from infini_train.plan.measure import measure_hardware

        described, found_rates = measure_hardware()
        named = dataclasses.asdict(dataclasses.replace(described, name="a core of the machine that the cases ran on"))
        write("measured.json", {**read("measured.json"), "hardware": named, "rates": found_rates})
    torch.set_num_threads(1)
    for name, kind in missing:
        if time.monotonic() > end:
            break
        value = run_case(name, kind)
        found = read("measured.json")
        value = min(value, found.get(name, {}).get(kind, value))
        write("measured.json", {**found, name: {**found.get(name, {}), kind: value}})
        print(f"{name}: {kind} {value:.4g}", flush=True)


def main() -> None:
    """Measures, and reports when all is measured (or with --report)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=280, help="start no further case after this time")
    parser.add_argument("--kind", choices=("time", "memory"), action="append", help="measure only this")
    parser.add_argument("--again", action="store_true", help="measure times that are there once more")
    parser.add_argument("--report", action="store_true", help="errors of what is measured, without measuring")
    options = parser.parse_args()
    kinds = options.kind or ["memory", "time"]
    if options.again:
        measure([(name, "time") for name in CASES if "memory only" not in name], options.seconds, rates=True)
    elif not options.report:
        measure(wanted(kinds), options.seconds)
    left = len(wanted(["memory", "time"]))
    print(f"{left} measurements are left")
    if options.report or not left:
        report()


if __name__ == "__main__":
    main()
