"""The runs that benchmarks/plan.py measures: those to calibrate with, and those held out."""

import json
from pathlib import Path
from typing import Any

from infini_train.atomic_files import write_atomic
from infini_train.config.files import validate
from infini_train.config.run import RunConfig, divide_processes

RESULTS = Path(__file__).resolve().parent / "results" / "plan"


def case(processes: int, hidden: int, layers: int, segment: int, segments: int, **changes: Any) -> dict[str, Any]:
    """A config and its number of processes; heads of 64 (two per key-value head) unless `changes` say otherwise."""
    heads = changes.pop("heads", max(2, hidden // 64))
    parallel = {name: changes.pop(name) for name in list(changes) if name.endswith(("_size", "_stages", "_stage"))}
    kind = {"kind": changes.pop("kind", "infini")}
    if kind["kind"] != "full":
        kind["segment_tokens"] = segment
    if "update" in changes:
        kind["update"] = changes.pop("update")
    if parallel.get("tensor_size", 1) > 1:
        parallel["sequence_parallel"] = changes.pop("sequence", True)
    model = {
        "vocab_size": changes.pop("vocab", 1024),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads // 2,
        "ffn_size": changes.pop("ffn", 2 * hidden),
        "attention": kind,
    }
    train = {"window_tokens": segment * segments, "batch_lanes": 2, "micro_batch_lanes": 1, "max_steps": 1, **changes}
    tree = {"model": model, "data": {"train": "-"}, "train": train, "optim": {"warmup_steps": 0}}
    return {"processes": processes, "config": {**tree, "parallel": parallel}}


CALIBRATION = {
    "wide": case(1, 512, 2, 128, 8),
    "deep": case(1, 128, 8, 128, 4),
    "long": case(1, 256, 2, 128, 32, batch_lanes=1),
    "local": case(1, 256, 4, 256, 4, kind="local"),
    "large vocabulary": case(1, 256, 2, 128, 8, vocab=16384),
    "checkpointed": case(1, 256, 4, 128, 8, activation_checkpointing="layer"),
    "four lanes": case(1, 256, 3, 64, 8, batch_lanes=8, micro_batch_lanes=4),
    "data 2": case(2, 256, 3, 128, 8, batch_lanes=4),
    "tensor 2": case(2, 256, 3, 128, 8, tensor_size=2),
    "tensor 2, narrow": case(2, 128, 4, 64, 4, tensor_size=2),
    "context 2": case(2, 256, 3, 128, 16, context_size=2),
    "pipeline 2": case(2, 256, 4, 128, 8, pipeline_size=2, batch_lanes=4),
}
HELD_OUT = {
    "middle": case(1, 384, 3, 128, 12),
    "narrow and deep": case(1, 192, 7, 64, 12, batch_lanes=3),
    "long segments": case(1, 256, 3, 512, 4),
    "delta": case(1, 256, 3, 128, 10, update="delta"),
    "full": case(1, 256, 3, 128, 6, kind="full"),
    "local, wide": case(1, 448, 2, 128, 8, kind="local", heads=8),
    "checkpointed, wide": case(1, 384, 4, 128, 8, activation_checkpointing="layer"),
    "three lanes": case(1, 256, 2, 128, 6, batch_lanes=6, micro_batch_lanes=3, vocab=4096),
    "data 2, ZeRO 2": case(2, 384, 3, 128, 8, batch_lanes=4, zero_stage=2),
    "data 2, ZeRO 3": case(2, 384, 2, 128, 8, batch_lanes=4, zero_stage=3),
    "tensor 2, wide": case(2, 512, 2, 128, 8, tensor_size=2),
    "tensor 2, no sequence": case(2, 384, 2, 128, 8, tensor_size=2, sequence=False, heads=8),
    "context 2, delta": case(2, 256, 2, 128, 16, context_size=2, update="delta"),
    "pipeline 2, virtual 2": case(2, 256, 4, 128, 6, pipeline_size=2, virtual_stages=2, batch_lanes=4),
    "pipeline 2, uneven": case(2, 320, 3, 128, 8, pipeline_size=2, batch_lanes=3, heads=4),
    "tensor 2, data 2": case(4, 256, 3, 128, 8, tensor_size=2, batch_lanes=4),
    "pipeline 2, context 2": case(4, 256, 4, 128, 8, pipeline_size=2, context_size=2, batch_lanes=4),
    "data 4": case(4, 256, 2, 128, 8, batch_lanes=4),
    "bf16 (memory only)": case(1, 256, 2, 128, 4, precision="bf16"),
    "bf16, data 2 (memory only)": case(2, 256, 2, 128, 4, precision="bf16"),
}
CASES = {**CALIBRATION, **HELD_OUT}


def resolve(name: str) -> RunConfig:
    """The case's config, with its `parallel.data_size`."""
    return divide_processes(validate(CASES[name]["config"]), CASES[name]["processes"])


def read(file: str) -> dict[str, Any]:
    path = RESULTS / file
    return json.loads(path.read_text()) if path.exists() else {}


def write(file: str, values: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / file, json.dumps(values, indent=1) + "\n")
