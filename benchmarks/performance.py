"""How fast attention layers and training steps are, and what they need: docs/results/performance.md.

    make bench                                      # everything, in some 20 minutes on 2 cores
    make bench-check                                # three of the comparisons, against the ratios that must hold
    python benchmarks/performance.py --report       # the page only, from what was measured

What is compared is timed in turn, round after round, in one process; a ratio is the median of the rounds' ratios, so
that whatever else the machine does meets both sides alike. infini-transformer-pytorch is compared where it is
installed (pip install infini-transformer-pytorch==0.2.1). Peak memory is measured in processes of their own.
"""

import argparse
import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from page import keep_result

from infini_train.parallel import device

device.prepare("cpu")  # before megatron-core is imported, which would warn

from performance_layers import Layer, Shape, make_layers  # noqa: E402
from performance_report import ratio, write_report  # noqa: E402

from infini_train.config.files import load_run  # noqa: E402
from infini_train.config.run import RunConfig  # noqa: E402
from infini_train.data.lanes import Batch  # noqa: E402
from infini_train.model.init import initialise  # noqa: E402
from infini_train.model.transformer import Transformer  # noqa: E402
from infini_train.parallel import mesh  # noqa: E402
from infini_train.train.building import build, empty_carried  # noqa: E402
from infini_train.train.optim import learning_rates, parameter_groups  # noqa: E402
from infini_train.train.step import train_step  # noqa: E402

Row = dict[str, Any]
FULL_TOKENS = 8 * 1024  # full attention takes minutes for more
SHAPES = (  # tokens, segment, head size, precision
    *[(tokens * 1024, 512, 64, "fp32") for tokens in (2, 4, 8, 32, 64)],
    (32 * 1024, 2048, 128, "fp32"),
    (8 * 1024, 512, 64, "bf16"),
)
ROUNDS = {2: 9, 4: 9, 8: 7, 32: 5, 64: 3}  # by K tokens
MEMORY = (("linear", 16), ("linear", 64), ("linear", 256), ("plain loop", 16), ("plain loop", 64))  # K tokens
CHECKED = (8 * 1024, 512, 64, "fp32")
FLOORS = {("plain loop", "linear"): 0.9, ("full attention", "linear"): 1.0, ("linear", "delta"): 0.5}  # of CHECKED
STEP_TOKENS, STEP_ROUNDS = 1024, 5


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--check", action="store_true", help="compare with the floors; exit code 1 below one")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, nothing kept: prints the rows")
    parser.add_argument("--peak", nargs=2, metavar=("LAYER", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    mesh.start()
    if options.peak:
        print(peak_bytes(options.peak[0], int(options.peak[1])))
    elif options.check:
        sys.exit(check())
    elif options.rehearse:
        print(measure((256, 64, 64, "fp32"), 2), measure_step(tokens=64, rounds=1, layers=1), peak_of("linear", 256))
    else:
        if not options.report:
            measure_all()
        write_report()


def measure_all() -> None:
    """Everything, kept after each part."""
    found: Row = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    found["layers"] = []
    for shape in SHAPES:
        found["layers"].append(measure(shape, ROUNDS[shape[0] // 1024]))
        keep_result("performance", found)
    found["memory"] = [peak_of(layer, tokens * 1024) for layer, tokens in MEMORY]
    found["step"] = measure_step(STEP_TOKENS, STEP_ROUNDS)
    keep_result("performance", found)


# -------------------------------------------------------------------------------------------------------------- layers


def measure(sizes: tuple[int, int, int, str], rounds: int) -> Row:
    """Seconds of each layer's forward and backward in each round, and the share of the matmul peak."""
    shape = Shape(*sizes)
    layers, hidden = make_layers(shape, FULL_TOKENS), shape.draw()
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    peaks = []
    for number in range(rounds + 1):  # the first warms up
        peaks.append(device.matmul_peak_flops(shape.dtype))
        for name, layer in layers.items():
            lasted = time_pass(layer, hidden)
            if number:
                seconds[name].append(lasted)
    row = {**asdict(shape), "heads": shape.heads, "seconds": seconds, "peak_flops": max(peaks)}
    row["product_flops"] = shape.product_flops()
    medians = {name: f"{1e3 * statistics.median(of):.0f} ms" for name, of in seconds.items()}
    print(f"{sizes}: {medians}", flush=True)
    return row


def time_pass(layer: Layer, hidden: torch.Tensor) -> float:
    """Seconds of a forward and a backward."""
    hidden.grad = None
    gc.collect()
    begin = time.perf_counter()
    out = layer(hidden)
    out.backward(torch.ones_like(out))
    return time.perf_counter() - begin


def check() -> int:
    """The number of ratios below their floor by more than this run's noise."""
    seconds = measure(CHECKED, ROUNDS[CHECKED[0] // 1024])["seconds"]
    failed = 0
    for (slow, fast), floor in FLOORS.items():
        found, noise = ratio(seconds, slow, fast)
        holds = found + noise >= floor
        failed += not holds
        said = "right" if holds else "WRONG"
        print(f"{said}: {fast} is {found:.2f} times as fast as {slow} (floor {floor}, noise {noise:.2f})")
    return failed


# -------------------------------------------------------------------------------------------------------------- memory


def peak_of(layer: str, tokens: int) -> Row:
    """Peak resident memory of a forward and backward beyond what was there before, in a process of its own."""
    command = [sys.executable, __file__, "--peak", layer, str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row = {"layer": layer, "tokens": tokens, "bytes": int(done.stdout.splitlines()[-1])}
    print(row, flush=True)
    return row


def peak_bytes(name: str, tokens: int) -> int:
    """See `peak_of`; in this process."""
    shape = Shape(tokens, 512, 64)
    layer, hidden = make_layers(shape, full_tokens=0)[name], shape.draw()
    before = device.peak_memory_bytes()
    time_pass(layer, hidden)
    return device.peak_memory_bytes() - before


# ---------------------------------------------------------------------------------------------------------------- step


def measure_step(tokens: int, rounds: int, layers: int = 12) -> Row:
    """Seconds of training steps of the 125m model in fp32: the framework's, and a bare loop around the same modules."""
    config = load_run(
        "125m",
        [
            *("device=cpu", "train.precision=fp32", "train.activation_checkpointing=none", "train.batch_lanes=1"),
            *(f"train.window_tokens={tokens}", f"model.attention.segment_tokens={tokens // 4}"),
            *("model.vocab_size=4096", f"model.num_layers={layers}"),
        ],
    )
    batch = draw_window(tokens, config.model.vocab_size)
    ways = {"framework": framework_step(config, batch), "bare loop": bare_step(config, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms up
        for name, step in ways.items():
            begin = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    print(f"step: {seconds}", flush=True)
    return {"tokens": tokens, "seconds": seconds}


def draw_window(tokens: int, vocab_size: int) -> Batch:
    """A window of one lane in the middle of a document."""
    tokens_BT = np.random.default_rng(0).integers(0, vocab_size, (1, tokens))
    no_starts_BT, ones_BT = np.zeros((1, tokens), dtype=bool), np.ones((1, tokens), np.float32)
    return Batch(tokens_BT, tokens_BT, no_starts_BT, ones_BT, np.zeros(1, np.int64), float(tokens))


def framework_step(config: RunConfig, batch: Batch) -> Callable[[], object]:
    """A step of `infini-train train`, with its engine, counts and guards."""
    stages, engine, _ = build(config, mesh.place(), None)
    carried, rates = empty_carried(config, stages), learning_rates(0, 1, config.optim)
    return lambda: train_step(stages, engine, batch, carried, rates)


def bare_step(config: RunConfig, batch: Batch) -> Callable[[], object]:
    """The same mathematics, without anything around it."""
    model = Transformer(config.model)
    initialise(model, config.model, config.seed)
    groups = parameter_groups(model.named_parameters(), config.optim)
    adamw = torch.optim.AdamW(groups, betas=(config.optim.beta1, config.optim.beta2), fused=True)
    drawn = (batch.tokens_BT, batch.labels_BT, batch.starts_BT, batch.weights_BT)
    tokens_BT, labels_BT, starts_BT, weights_BT = map(torch.from_numpy, drawn)
    state = model.initial_state(1)

    def step() -> None:
        grids = model.make_grids(starts_BT, weights_BT, state)
        loss, following = model(tokens_BT, grids, state, labels_BT, weights_BT / tokens_BT.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        adamw.step()
        adamw.zero_grad()
        model.carry_over(following)

    return step


if __name__ == "__main__":
    main()
