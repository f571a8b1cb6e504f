"""The tables of docs/results/gpu.md, from what gpu_check.py kept."""

from typing import Any

from gpu_check import SECTIONS, read_rows
from page import RESULTS, ResultPage, as_table

NOT_RUN = "Not run yet."
FOLDER = RESULTS / "gpu"


def rows_of(section: str, what: str) -> list[dict[str, Any]]:
    """The results of one kind."""
    return [row for row in read_rows(FOLDER, section) if row["what"] == what]


def flat(text: str) -> str:
    """In one cell of a table."""
    return " ".join(text.split()).replace("|", "/")


def summary() -> str:
    """A row for each section."""
    ends = [(name, row) for name in SECTIONS for row in rows_of(name, "section")]
    rows = [[name, "right" if row["right"] else "wrong or failed", f"{row['took_s']:.0f} s"] for name, row in ends]
    machines = [f"{row['device']}, torch {row['torch']}" for row in rows_of("forms", "machine")]
    return "\n\n".join([*machines, as_table(["section", "outcome", "took"], rows)]) if rows else NOT_RUN


def forms() -> str:
    """A row for each form and way to run it."""
    rows = []
    for row in rows_of("forms", "form"):
        cells = [row["form"], row["precision"] + (", compiled" if row["compiled"] else "")]
        errors = [f"{row[part]:.1e}" if part in row else "" for part in ("loss", "states", "gradients")]
        rows.append([*cells, *errors, flat(row.get("error", "right" if row["right"] else "WRONG"))])
    return as_table(["form", "precision", "loss", "states", "gradients", ""], rows) if rows else NOT_RUN


def speeds() -> str:
    """A row for each trained model, measured and planned."""
    head = ["model", "tokens/s", "planned", "MFU", "planned", "peak memory", "planned"]
    head += ["first step", "forward", "backward"]
    rows = []
    for row in rows_of("train", "train"):
        if "error" in row:
            rows.append([row["case"], flat(row["error"]), *[""] * (len(head) - 2)])
            continue
        planned = row["planned"] or {}
        of_plan = (
            [f"{planned['tokens_s']:,.0f}", f"{planned['mfu']:.0%}", f"{planned['peak_memory_bytes'] / 1e9:.1f} GB"]
            if planned
            else [""] * 3
        )
        measured = [f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.0%}", f"{row['peak_memory_bytes'] / 1e9:.1f} GB"]
        cells = [cell for pair in zip(measured, of_plan, strict=True) for cell in pair]
        seconds = [f"{row[name]:.2f} s" for name in ("first_step_s", "forward", "backward")]
        rows.append([row["case"], *cells, *seconds])
    return as_table(head, rows) if rows else NOT_RUN


def kernels() -> str:
    """What is used, and local attention with and without it."""
    rows = rows_of("kernels", "kernels")
    if not rows:
        return NOT_RUN
    used = [
        [str(row["head_dim"]), *("yes" if row[name] else "no" for name in ("varlen", "flash_linear_attention"))]
        for row in rows
    ]
    timed = [
        ["runs" if row["runs"] else "mask", f"{row['first_ms']:.1f} ms", f"{row['ms']:.2f} ms"]
        for row in rows_of("kernels", "local attention")
    ]
    tables = [as_table(["head size", "varlen kernel", "flash-linear-attention"], used)]
    return "\n\n".join([*tables, as_table(["local attention by", "first call", "fastest of four"], timed)])


def profile() -> str:
    """The table of the profiler as it is."""
    rows = rows_of("profile", "profile")
    return "\n".join(["```text", *rows[0]["table"], "```"]) if rows else NOT_RUN


PAGE = ResultPage(
    "gpu",
    "benchmarks/gpu_check.py",
    {
        "GPU summary": summary,
        "GPU speeds": speeds,
        "GPU forms": forms,
        "GPU kernels": kernels,
        "GPU profile": profile,
    },
)
