"""Context parallelism: bytes and time of crossing memories, against exchanging heads (Ulysses) or keys and values.

    python benchmarks/context_parallel.py             # measures, then writes the tables and the picture
    python benchmarks/context_parallel.py --report    # tables and picture only, from the kept measurements

Computed, for one layer of an 8B model (32 query heads, 8 key-value heads of size 128; bf16 activations, fp32 memories)
on 8 ranks: bytes that one rank sends in a forward, by the formulas in `sent_bytes`; a backward sends as much again.
Also the modelled time of three ways to compose memories (`composition_s`).

Measured, on gloo processes of this machine with a small layer: bytes of the buffers handed to the collectives, and
seconds of a forward of attention with its communication. Ulysses: q, k, v change from shards of tokens to shards of
heads by one all-to-all each, full causal attention, one all-to-all back. Ring: keys and values of all ranks are
gathered (in one collective; a ring in rounds sends as much), each rank's queries attend to those before them. These two
compute full attention, which costs more with every token. Infini-attention is another function, so the seconds compare
what a layer costs, not two ways to one result. They are kept in benchmarks/results/context_parallel.json; the tables
stand in docs/results/context-parallel.md, the picture in docs/images/.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from page import IMAGES, RESULTS, ResultPage, keep_result
from torch import Tensor

from infini_train.ops.attention import infini_attention
from infini_train.ops.grid import make_grid
from infini_train.ops.memory import Form
from infini_train.parallel.context import ContextRanks


class Layer(NamedTuple):
    """Shapes of one layer for one sequence, and bytes of an activation and of a number of the memory."""

    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    activation_bytes: int = 2
    memory_bytes: int = 4


LARGE, RANKS = Layer(), 8
SMALL, PROCESSES, SEGMENT = Layer(heads=4, kv_heads=4, head_size=32, activation_bytes=4), 4, 512
LENGTHS = [2**power for power in range(13, 21)]
METHODS = ("linear", "delta", "ulysses", "ring")
LABELS = {
    "linear": "memory, linear",
    "delta": "memory, delta",
    "ulysses": "Ulysses: q, k, v, out",
    "ring": "ring: keys and values",
}
LATENCY_S, BANDWIDTH_BYTES_S = 10e-6, 25e9  # of a message between nodes; 200 Gbit/s per rank


def memory_numbers(layer: Layer, update: str) -> int:
    """Numbers that a rank contributes: M, z and the count; the delta update's transition too."""
    square = layer.kv_heads * layer.head_size**2
    return square + layer.kv_heads * layer.head_size + 1 + (square if update == "delta" else 0)


def sent_bytes(method: str, tokens: int, ranks: int, layer: Layer) -> float:
    """Bytes that one rank sends in one forward of one layer, per sequence."""
    here, token_bytes = tokens // ranks, layer.head_size * layer.activation_bytes
    if method == "ulysses":  # one part of what a rank holds stays there
        return here * (2 * layer.heads + 2 * layer.kv_heads) * token_bytes * (ranks - 1) / ranks
    if method == "ring":
        return (ranks - 1) * here * 2 * layer.kv_heads * token_bytes
    return (ranks - 1) * memory_numbers(layer, method) * layer.memory_bytes


def composition_s(way: str, ranks: int, message_bytes: int) -> float:
    """Modelled seconds until every rank has its entering and the final memory; one message costs latency + bytes."""
    message_s = LATENCY_S + message_bytes / BANDWIDTH_BYTES_S
    rounds = math.ceil(math.log2(ranks))
    if way == "all-gather":  # ring
        return (ranks - 1) * message_s
    if way == "log-step scan":  # and a broadcast of the final memory
        return 2 * rounds * message_s
    return (ranks - 1 + rounds) * message_s  # one neighbour after the other, and the broadcast


# ---------------------------------------------------------------------------------------------------------- measured


def main() -> None:
    """Measures unless --report, then writes the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[8192, 16384, 32768], metavar="TOKENS", help="to measure"
    )
    parser.add_argument("--report", action="store_true", help="only make the tables and the picture")
    options = parser.parse_args()
    if not options.report:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(measure, (folder, options.lengths), PROCESSES, start_method="fork")
            rows = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
        keep_result("context_parallel", {"processes": PROCESSES, "rows": rows})
    PAGE.write()
    plot(compute(), load(), IMAGES / "context_parallel.png")
    print(composition_table())


def compute() -> dict[str, dict[int, float]]:
    """Bytes that a rank sends, by method and length."""
    return {method: {tokens: sent_bytes(method, tokens, RANKS, LARGE) for tokens in LENGTHS} for method in METHODS}


def load() -> list[dict[str, Any]]:
    """The kept measurements."""
    found = json.loads((RESULTS / "context_parallel.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def measure(rank: int, folder: str, lengths: list[int]) -> None:
    """One of the processes; the first one writes what was found."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    rows = [measure_one(method, tokens) for tokens in lengths for method in METHODS]
    if rank == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure_one(method: str, tokens: int) -> dict[str, Any]:
    """Best of three forwards, of the slowest rank."""
    source = torch.Generator().manual_seed(dist.get_rank())
    shape = (1, SMALL.heads, tokens // PROCESSES, SMALL.head_size)
    q, k, v = (torch.randn(shape, generator=source) for _ in range(3))
    attend: Callable[..., int] = {"ulysses": ulysses, "ring": ring}.get(method) or memories(Form(method), tokens)
    best_s = math.inf
    with torch.no_grad():
        for _ in range(3):
            dist.barrier()
            start = time.perf_counter()
            sent = attend(q, k, v)
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            best_s = min(best_s, took.item())
    return {"method": method, "tokens": tokens, "sent_bytes": sent, "seconds": best_s}


def memories(form: Form, tokens: int) -> Callable[[Tensor, Tensor, Tensor], int]:
    """This project's attention."""
    ranks = ContextRanks(dist.group.WORLD)
    grid = make_grid(torch.zeros(1, tokens, dtype=torch.bool), torch.ones(1, tokens), None, SEGMENT, 0, ranks.shard)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> int:
        ranks.sent_bytes = 0
        infini_attention(q, k, v, torch.zeros(SMALL.heads), None, grid, form=form, ranks=ranks)
        return ranks.sent_bytes

    return attend


def ulysses(q: Tensor, k: Tensor, v: Tensor) -> int:
    """All tokens of a part of the heads."""
    sent = 0

    def exchange(parts: Tensor) -> Tensor:
        nonlocal sent
        arrived = torch.empty_like(parts)
        dist.all_to_all_single(arrived, parts.contiguous())
        sent += parts[1:].nbytes  # all but the part that stays
        return arrived

    def to_heads(x_BHTD: Tensor) -> Tensor:
        parts = exchange(x_BHTD.unflatten(1, (PROCESSES, -1)).movedim(1, 0).contiguous())
        return parts.movedim(0, 2).flatten(2, 3)

    out = F.scaled_dot_product_attention(to_heads(q), to_heads(k), to_heads(v), is_causal=True)
    back = exchange(out.unflatten(2, (PROCESSES, -1)).movedim(2, 0).contiguous()).movedim(0, 1).flatten(1, 2)
    assert back.shape == q.shape
    return sent


def ring(q: Tensor, k: Tensor, v: Tensor) -> int:
    """All keys and values before a part of the queries."""
    mine = torch.stack((k, v))
    parts = [torch.empty_like(mine) for _ in range(PROCESSES)]
    dist.all_gather(parts, mine)
    rank, here = dist.get_rank(), q.shape[2]
    before = torch.cat(parts[: rank + 1], 3)
    mask = torch.ones(here, before.shape[3], dtype=torch.bool).tril(rank * here)
    F.scaled_dot_product_attention(q, before[0], before[1], attn_mask=mask)
    return (PROCESSES - 1) * mine.nbytes


# ------------------------------------------------------------------------------------------------------------- shown


def computed_table(computed: dict[str, dict[int, float]]) -> str:
    """MB per rank, layer and sequence."""
    lines = [f"| Tokens | {' | '.join(LABELS[method] for method in METHODS)} |", "|---:" * 5 + "|"]
    for tokens in LENGTHS:
        cells = " | ".join(f"{computed[method][tokens] / 1e6:.1f}" for method in METHODS)
        lines.append(f"| {tokens // 1024}K | {cells} |")
    return "\n".join(lines)


def measured_table(rows: list[dict[str, Any]]) -> str:
    """KB by count and by formula, and milliseconds."""
    lines = ["| Tokens | Method | KB sent | by formula | ms |", "|---:|---|---:|---:|---:|"]
    for row in rows:
        formula = sent_bytes(row["method"], row["tokens"], PROCESSES, SMALL)
        assert formula == row["sent_bytes"], row
        kb, milliseconds = row["sent_bytes"] / 1e3, 1e3 * row["seconds"]
        lines.append(
            f"| {row['tokens'] // 1024}K | {LABELS[row['method']]} | {kb:.1f} | {formula / 1e3:.1f} "
            f"| {milliseconds:.0f} |"
        )
    return "\n".join(lines)


def composition_table() -> str:
    """Microseconds of the ways to compose."""
    ways = ("all-gather", "log-step scan", "neighbour after neighbour")
    lines = [f"| Ranks | Update | KV heads per rank | {' | '.join(ways)} |", "|---:|---|---:" + "|---:" * 3 + "|"]
    for ranks in (2, 8, 16, 64):
        for update in ("linear", "delta"):
            for kv_heads in (8, 1):
                message = memory_numbers(LARGE._replace(kv_heads=kv_heads), update) * LARGE.memory_bytes
                cells = " | ".join(f"{1e6 * composition_s(way, ranks, message):.0f}" for way in ways)
                lines.append(f"| {ranks} | {update} | {kv_heads} | {cells} |")
    return "\n".join(lines)


def plot(computed: dict[str, dict[int, float]], rows: list[dict[str, Any]], file: Path) -> None:
    """Bytes (computed) and time (measured) against tokens, all logarithmic."""
    figure, (sent, took) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for method, marker in zip(METHODS, "osD^", strict=True):
        sent.loglog(LENGTHS, [computed[method][tokens] for tokens in LENGTHS], marker=marker, label=LABELS[method])
        mine = [row for row in rows if row["method"] == method]
        took.loglog([row["tokens"] for row in mine], [1e3 * row["seconds"] for row in mine], marker=marker)
    for axes, lengths in ((sent, LENGTHS), (took, sorted({row["tokens"] for row in rows}))):
        axes.set_xticks(lengths, [f"{tokens // 1024}K" for tokens in lengths])
        axes.minorticks_off()
        axes.set_xlabel("sequence length (tokens)")
        axes.grid(alpha=0.3)
    sent.set_ylabel("bytes sent per rank, one layer, forward")
    sent.set_title(f"8B model, {RANKS} context-parallel ranks, one sequence (computed)")
    sent.legend()
    took.set_ylabel("milliseconds of a forward of one layer")
    took.set_title(f"small layer, {PROCESSES} gloo processes (measured)")
    figure.savefig(file, dpi=120)


PAGE = ResultPage(
    "context-parallel",
    "benchmarks/context_parallel.py",
    {"computed bytes": lambda: computed_table(compute()), "measured bytes": lambda: measured_table(load())},
)


if __name__ == "__main__":
    main()
