"""What a gated delta memory becomes over a million tokens: its size, and what fp32 makes of it.

    python benchmarks/stability.py

Tokens stream through one memory of 2 heads (keys and values of 32 numbers) in windows of 1,024 tokens, by the
project's own ops: drawn at random, and drawn to hurt. The same tokens stream through a memory in float64. After 1K,
16K, 256K and 1M tokens both are compared. Takes a few minutes on one core. The result is kept in
benchmarks/results/stability.json, the table stands in docs/results/stability.md.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from page import RESULTS, ResultPage, as_table, keep_result
from torch import Tensor

from infini_train.ops.attention import Additions, InfiniState, write_memory
from infini_train.ops.gated_delta import GatedMemory, Writing, empty_gated_memory
from infini_train.ops.grid import make_grid, no_recent
from infini_train.ops.memory import Form

HEADS, KEY_DIM, VALUE_DIM, WINDOW = 2, 32, 32, 1024
LENGTHS = (2**10, 2**14, 2**18, 2**20)
SLOW_DECAY = -1e-4  # log(a): about what `model.attention.decay_init` begins with
FORM = Form("gated_delta", read="token")


class Tokens(NamedTuple):
    """A window of one lane: keys and values (1, K, T, D), and how each token writes (1, K, T)."""

    k_BKTD: Tensor
    v_BKTE: Tensor
    writing: Writing


@dataclass(frozen=True)
class Stream:
    """One row of the table.

    Attributes:
        title: what is streamed.
        keys: makes keys of random numbers (1, K, T, D) and of the number of the window's first token.
        strength: what the write strength's sigmoid is taken of, plus a number of standard deviation 1 if `varied`.
        log_decay: log of what the memory keeps of itself at each token.
        dtype: of keys and values.
    """

    title: str
    keys: Callable[[Tensor, int], Tensor] = lambda random, first: random
    strength: float = 0.0
    varied: bool = True
    log_decay: float = 0.0
    dtype: torch.dtype = torch.float32

    def draw(self, generator: torch.Generator, first: int) -> Tokens:
        """The window that begins with this token."""
        keys, values = (torch.randn(1, HEADS, WINDOW, size, generator=generator) for size in (KEY_DIM, VALUE_DIM))
        noise = torch.randn(1, HEADS, WINDOW, generator=generator)
        logits = self.strength + (noise if self.varied else torch.zeros_like(noise))
        writing = Writing(F.logsigmoid(-logits), torch.full_like(logits, self.log_decay))
        return Tokens(self.keys(keys, first).to(self.dtype), values.to(self.dtype), writing)


def one_direction(random_BKTD: Tensor, first: int) -> Tensor:
    """The same key for all tokens."""
    return torch.ones_like(random_BKTD)


def nearly_one_direction(random_BKTD: Tensor, first: int) -> Tensor:
    """Keys a thousandth apart."""
    return 1 + 1e-3 * random_BKTD


def leave_alone(random_BKTD: Tensor, first: int) -> Tensor:
    """After the first window half of all directions are never written again, as far as rounding allows."""
    turned = torch.linalg.qr(torch.randn(KEY_DIM, KEY_DIM, generator=torch.Generator().manual_seed(1)))[0]
    used = torch.arange(KEY_DIM) < (KEY_DIM if first == 0 else KEY_DIM // 2)
    return (random_BKTD * used) @ turned


STREAMS = (
    Stream("random", log_decay=SLOW_DECAY),
    Stream("random, no decay"),
    Stream("random, no decay, bf16", dtype=torch.bfloat16),
    Stream("random, no decay, strength 0.999999", strength=14.0, varied=False),
    Stream("random, no decay, strength 0.0001", strength=-9.2, varied=False),
    Stream("all keys equal, no decay", one_direction),
    Stream("all keys equal, no decay, strength 0.999999", one_direction, strength=14.0, varied=False),
    Stream("keys 0.001 apart, no decay, strength 0.999999", nearly_one_direction, strength=14.0, varied=False),
    Stream("half of it never written again, no decay", leave_alone),
)


def main() -> None:
    """Measures unless --report, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table")
    if not parser.parse_args().report:
        rows = []
        for stream in STREAMS:
            rows.append(measure(stream))
            print(f"{stream.title:<48} {rows[-1]['places'][-1]}", flush=True)
        keep_result("stability", {"heads": HEADS, "key_dim": KEY_DIM, "value_dim": VALUE_DIM, "rows": rows})
    PAGE.write()


@torch.no_grad()
def measure(stream: Stream, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """Streams one row through both memories, and compares them after each of these lengths (whole windows)."""
    generator, places = torch.Generator().manual_seed(0), []
    narrow, exact = (empty(dtype) for dtype in (torch.float32, torch.float64))
    for first in range(0, max(lengths), WINDOW):
        tokens = stream.draw(generator, first)
        narrow, exact = write(tokens, narrow, stream.dtype), write(tokens, exact, torch.float64)
        if first + WINDOW in lengths:
            places.append({"tokens": first + WINDOW, **compare(narrow, exact)})
    return {"stream": stream.title, "places": places}


def empty(dtype: torch.dtype) -> GatedMemory:
    return empty_gated_memory(1, HEADS, KEY_DIM, VALUE_DIM, torch.zeros((), dtype=dtype), "token")


def write(tokens: Tokens, memory: GatedMemory, dtype: torch.dtype) -> GatedMemory:
    """The memory after a window with activations of this dtype."""
    k_BKTD, v_BKTE = tokens.k_BKTD.to(dtype), tokens.v_BKTE.to(dtype)
    state = InfiniState(memory, no_recent((1, HEADS, KEY_DIM), VALUE_DIM, 0, k_BKTD))
    grid = make_grid(torch.zeros(1, WINDOW, dtype=torch.bool), torch.ones(1, WINDOW), state.recent, WINDOW)
    after = write_memory(k_BKTD, v_BKTE, state, grid, form=FORM, additions=Additions(tokens.writing)).memory
    assert isinstance(after, GatedMemory) and after.memory_BKDE.dtype == memory.memory_BKDE.dtype
    return after


def compare(narrow: GatedMemory, exact: GatedMemory) -> dict[str, float]:
    """Norm of M (largest of the heads), largest number, numbers that are none, and the largest head's error of fp32."""
    found, right = narrow.memory_BKDE, exact.memory_BKDE
    norm_BK = right.norm(dim=(-2, -1))
    return {
        "norm": found.norm(dim=(-2, -1)).max().item(),
        "largest": found.abs().max().item(),
        "not_finite": int((~found.isfinite()).sum()),
        "relative_error": ((found.double() - right).norm(dim=(-2, -1)) / norm_BK).max().item(),
    }


def tabulate() -> str:
    """A row for each stream: norms and errors by length, and the extremes over all lengths."""
    rows = []
    for row in json.loads((RESULTS / "stability.json").read_text(encoding="utf-8"))["rows"]:
        places = row["places"]
        norms, errors = ([place[name] for place in places] for name in ("norm", "relative_error"))
        largest, lost = max(place["largest"] for place in places), sum(place["not_finite"] for place in places)
        rows.append(
            [row["stream"], *(f"{x:.2f}" for x in norms), f"{largest:.2f}", str(lost), *(f"{x:.1e}" for x in errors)]
        )
    names = ("1K", "16K", "256K", "1M")
    head = ["tokens", *(f"norm at {name}" for name in names), "largest number", "not finite"]
    return as_table([*head, *(f"error at {name}" for name in names)], rows)


PAGE = ResultPage("stability", "benchmarks/stability.py", {"stability": tabulate})


if __name__ == "__main__":
    main()
