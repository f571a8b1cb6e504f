"""Peak memory and time of the loss of a large vocabulary: all logits at once, and in chunks of tokens.

    python benchmarks/loss.py             # measures, then writes the table
    python benchmarks/loss.py --report    # the table only, from the kept measurements

Both take hidden states and a weight, and give the loss and the gradients of both. "Whole" is what the model did before:
logits of all tokens, then megatron-core's vocab_parallel_cross_entropy.

Counted, on the meta device with a vocabulary of 128K: the storages that are alive at the fullest moment beyond hidden
states and weight, the gradients among them, and the bytes that elementwise operations move.

Measured, in fp32 on one thread: the processor's seconds for forward and backward, both ways in turn in one process, so
that whatever else the machine does meets both alike; and the largest resident set beyond that before the first pass,
each way in a process of its own. Results are kept in benchmarks/results/loss.json, the tables stand in
docs/results/loss.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from page import RESULTS, ResultPage, as_table, keep_result
from torch import Tensor

from infini_train.ops.chunked_loss import Rows, chunk_tokens, weighted_loss
from infini_train.parallel import device, mesh
from infini_train.plan.tracing import tracing

COUNTED = ((128 * 1024, 8192, 1024), (128 * 1024, 32 * 1024, 1024))  # vocabulary, tokens, hidden size
MEASURED = ((32 * 1024, 4096, 256), (512, 4096, 256))
WAYS = ("whole", "chunks")


def main() -> None:
    """Measures unless --report, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=6, metavar="N", help="timed, of each case and way")
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)  # the process that measures memory
    options = parser.parse_args()
    device.prepare()
    mesh.start()
    if options.alone:
        way, *sizes = options.alone
        print(measure_bytes(way, *map(int, sizes)))
        return
    if not options.report:
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        counted = [
            {**named(case), "precision": name, **{way: count(way, *case, dtype) for way in WAYS}}
            for case in COUNTED
            for name, dtype in dtypes.items()
        ]
        keep_result("loss", {"counted": counted, "measured": [compare(case, options.passes) for case in MEASURED]})
    PAGE.write()


def named(case: tuple[int, int, int]) -> dict[str, int]:
    """The sizes of a case, for its row."""
    return dict(zip(("vocabulary", "tokens", "hidden"), case, strict=True))


def compare(case: tuple[int, int, int], passes: int) -> dict[str, Any]:
    """Bytes, median seconds and the median ratio of seconds."""
    row: dict[str, Any] = {**named(case)}
    for way in WAYS:
        command = [sys.executable, __file__, "--alone", way, *map(str, case)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row[way] = {"bytes": int(done.stdout.splitlines()[-1])}
    seconds = measure_seconds(passes, *case)
    for way in WAYS:
        row[way]["seconds"] = statistics.median(seconds[way])
    ratios = (other / one for one, other in zip(*(seconds[way] for way in WAYS), strict=True))
    row["time_ratio"] = statistics.median(ratios)
    print(row, flush=True)
    return row


def draw(vocabulary: int, tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_ND, weight_VD and labels_N."""
    weight_VD = torch.randn(vocabulary, hidden, dtype=dtype).mul_(hidden**-0.5).requires_grad_()
    hidden_ND = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
    return hidden_ND, weight_VD, torch.randint(0, vocabulary, (tokens,))


def count(way: str, vocabulary: int, tokens: int, hidden: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes at the fullest moment, and bytes moved."""
    with device.on_meta():
        drawn = draw(vocabulary, tokens, hidden, dtype)
        with tracing(True, []) as trace:
            run(way, *drawn)
        return {"bytes": trace.peak_bytes(), "moved": trace.work.moved_bytes}


def measure_bytes(way: str, vocabulary: int, tokens: int, hidden: int) -> int:
    """What a pass needs beyond its inputs."""
    torch.set_num_threads(1)
    drawn = draw(vocabulary, tokens, hidden, torch.float32)
    before = device.peak_memory_bytes()
    run(way, *drawn)
    return device.peak_memory_bytes() - before


def measure_seconds(passes: int, vocabulary: int, tokens: int, hidden: int) -> dict[str, list[float]]:
    """The processor's seconds of each pass, after one that is not counted."""
    torch.set_num_threads(1)
    drawn = draw(vocabulary, tokens, hidden, torch.float32)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 + passes):
        for way in WAYS:
            begin = time.process_time()
            run(way, *drawn)
            found[way].append(time.process_time() - begin)
    return {way: seconds[1:] for way, seconds in found.items()}


def run(way: str, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> None:
    """Forward and backward."""
    weight_VD.grad = hidden_ND.grad = None
    (whole if way == "whole" else chunks)(hidden_ND, weight_VD, labels_N).backward()  # type: ignore[no-untyped-call]


def whole(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """All logits at once."""
    return vocab_parallel_cross_entropy((hidden_ND @ weight_VD.t()).float(), labels_N).mean()


def chunks(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """As the model does it."""
    return weighted_loss(hidden_ND, Rows(weight_VD), labels_N, torch.full(labels_N.shape, 1 / len(labels_N)))


def counted() -> str:
    """A row for each case and precision."""
    head = ["vocabulary", "tokens", "precision", "whole: peak", "chunks: peak", "whole: moved", "chunks: moved"]
    rows = []
    for row in load("counted"):
        cells = [f"{row['vocabulary']:,}", f"{row['tokens']:,}", row["precision"]]
        cells += [f"{row[way][name] / 1e9:.1f} GB" for name in ("bytes", "moved") for way in WAYS]
        rows.append(cells)
    return as_table(head, rows)


def measured() -> str:
    """A row for each case."""
    head = ["vocabulary", "tokens", "hidden", "in a chunk", "whole: peak", "chunks: peak", "whole", "chunks", "time"]
    rows = []
    for row in load("measured"):
        cells = [f"{row[name]:,}" for name in ("vocabulary", "tokens", "hidden")]
        cells.append(f"{min(row['tokens'], chunk_tokens(row['vocabulary'])):,}")
        cells += [f"{row[way]['bytes'] / 1e6:,.0f} MB" for way in WAYS]
        cells += [f"{row[way]['seconds']:.2f} s" for way in WAYS]
        rows.append([*cells, f"x {row['time_ratio']:.2f}"])
    return as_table(head, rows)


def load(name: str) -> list[dict[str, Any]]:
    """The kept rows of one table."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "loss.json").read_text(encoding="utf-8"))[name]
    return rows


PAGE = ResultPage("loss", "benchmarks/loss.py", {"counted": counted, "measured": measured})

if __name__ == "__main__":
    main()
