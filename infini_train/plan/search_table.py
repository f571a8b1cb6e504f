"""The layouts that a search found, as text and as JSON."""

import dataclasses
from typing import Any

from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig, divide_processes
from infini_train.plan.hardware import Hardware
from infini_train.plan.parts import find_parts
from infini_train.plan.search import Candidate, Search, fullest
from infini_train.plan.timing import predict

LAYOUT = ("tensor", "pipe", "virtual", "context", "data", "ZeRO", "micro", "recompute")
HEADER = (*LAYOUT, "GB", "step s", "tokens/s", "MFU")


def own_candidate(base: RunConfig, hardware: Hardware, processes: int) -> Candidate | None:
    """The layout that the config has itself; None if these processes can't be divided like that."""
    try:
        config = divide_processes(base, processes)
    except ConfigError:
        return None
    parts = find_parts(config)
    return Candidate(
        config=config,
        prediction=predict(config, hardware, parts),
        peak_bytes=fullest(config, hardware, parts),
    )


def format_search(found: Search, hardware: Hardware, top: int) -> str:
    """The config's own layout, the best ones, and what to add to the command line for each."""
    own = own_candidate(found.base, hardware, found.processes)
    best = found.candidates[:top]
    rows = [("", *HEADER)]
    if own is not None:
        rows.append(("config", *_cells(own)))
    rows += [(str(place), *_cells(each)) for place, each in enumerate(best, 1)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{found.base.name} on {found.processes:,} x {hardware.name}: {found.valid:,} layouts are valid,"
        f" {found.fitting:,} fit into {hardware.usable_bytes / 1e9:.0f} GB",
        "",
        *("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows),
    ]
    if own is not None and own.peak_bytes > hardware.usable_bytes:
        lines += ["", f"warning: the config's own layout needs {own.peak_bytes / 1e9:.1f} GB and does not fit"]
    lines.append("")
    for place, each in enumerate(best, 1):
        lines.append(f"{place}: " + " ".join(f"--set {override}" for override in each.overrides(found.base)))
    return "\n".join(line.rstrip() for line in lines)


def _cells(candidate: Candidate) -> tuple[str, ...]:
    config, prediction = candidate.config, candidate.prediction
    parallel = config.parallel
    return (
        str(parallel.tensor_size),
        str(parallel.pipeline_size),
        str(parallel.virtual_stages),
        str(parallel.context_size),
        str(parallel.data_size),
        str(parallel.zero_stage),
        str(config.micro_lanes),
        config.train.activation_checkpointing,
        f"{candidate.peak_bytes / 1e9:.1f}",
        f"{prediction.step_s:.2f}",
        f"{prediction.tokens_s:,.0f}",
        f"{prediction.mfu:.1%}",
    )


def search_json(found: Search, hardware: Hardware, top: int) -> dict[str, Any]:
    """Plain values, unrounded."""
    own = own_candidate(found.base, hardware, found.processes)

    def show(candidate: Candidate) -> dict[str, Any]:
        return {
            "overrides": candidate.overrides(found.base),
            "parallel": dataclasses.asdict(candidate.config.parallel),
            "micro_batch_lanes": candidate.config.micro_lanes,
            "activation_checkpointing": candidate.config.train.activation_checkpointing,
            "peak_bytes": candidate.peak_bytes,
            **dataclasses.asdict(candidate.prediction),
        }

    return {
        "name": found.base.name,
        "hardware": dataclasses.asdict(hardware),
        "processes": found.processes,
        "valid": found.valid,
        "fitting": found.fitting,
        "config": None if own is None else show(own),
        "candidates": [show(each) for each in found.candidates[:top]],
    }
