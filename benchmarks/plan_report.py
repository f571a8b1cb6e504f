"""How far `infini-train plan` is from what benchmarks/plan.py measured and from published runs, as tables.

Rates are calibrated on some cases and judged on the others. Two simpler models are compared: the rates that
`plan --measure` found, without any case, and one rate of useful operations.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from page import ResultPage
from plan_cases import CALIBRATION, CASES, read, resolve, write

from infini_train.config.files import validate
from infini_train.config.run import RunConfig
from infini_train.model.flops import training_flops_per_token
from infini_train.parallel.device import prepare
from infini_train.plan.hardware import Hardware, load_hardware, validate_hardware
from infini_train.plan.parts import find_parts
from infini_train.plan.search import fullest
from infini_train.plan.timing import predict

PRIOR = 0.1  # weight of what --measure found, against the relative error of a case
FITTED = ("matmul_efficiency", "attention_efficiency", "memory_gb_s", "launch_us", "node_gb_s", "node_latency_us")


def fit(measured: dict[str, Any], start: Hardware, names: list[str]) -> Hardware:
    """Gauss-Newton on logarithms of the rates: relative errors of cases, and a weak pull to what was measured.

    How much slower attention is in short segments, and each collective than the fastest, stays as --measure found it.
    """
    times = {name: measured[name]["time"] for name in names}
    configs = {name: resolve(name) for name in times}
    initial = np.array([math.log(max(1e-3, getattr(start, name))) for name in FITTED])

    def hardware(logs: np.ndarray) -> Hardware:
        rates = {name: float(math.exp(value)) for name, value in zip(FITTED, logs, strict=True)}
        short = rates["attention_efficiency"] * start.short_attention_efficiency / start.attention_efficiency
        return dataclasses.replace(start, **rates, short_attention_efficiency=short)

    def residuals(logs: np.ndarray) -> np.ndarray:
        now = hardware(logs)
        errors = [math.log(predict(configs[name], now).step_s / times[name]) for name in times]
        return np.array([*errors, *(PRIOR * (logs - initial))])

    most = np.array([0.0 if name.endswith("efficiency") else math.inf for name in FITTED])
    logs = initial.copy()
    for _ in range(40):
        now = residuals(logs)
        steps = 1e-4 * np.eye(len(logs))  # downwards: a share of the peak is at most 1
        slopes = np.stack([(now - residuals(logs - step)) / 1e-4 for step in steps], 1)
        change = np.linalg.lstsq(slopes, -now, rcond=None)[0]
        logs = np.minimum(logs + np.clip(change, -0.3, 0.3), most)
    return hardware(logs)


def fit_one_rate(measured: dict[str, Any], start: Hardware, names: list[str]) -> float:
    """Operations a second, if nothing but useful operations took time: the baseline to beat."""
    rates = [useful_flops(resolve(name)) / measured[name]["time"] / CASES[name]["processes"] for name in names]
    return statistics.geometric_mean(rates)


def useful_flops(config: RunConfig) -> float:
    return config.train.tokens_per_step * training_flops_per_token(config.model, config.train.window_tokens)


def find_errors(measured: dict[str, Any]) -> dict[str, Any]:
    """Every case's measured and predicted values, the calibration used, and published runs."""
    start = validate_hardware(measured["hardware"], "measured.json")
    timed = [name for name in CALIBRATION if "time" in measured.get(name, {})]
    fitted, rate = fit(measured, start, timed), fit_one_rate(measured, start, timed)
    peaks = {name: fullest(resolve(name), start, find_parts(resolve(name))) for name in CASES}
    known = [name for name in CALIBRATION if "memory" in measured.get(name, {})]
    process_bytes = statistics.median(measured[name]["memory"] - peaks[name] for name in known)
    rows = {}
    for name in CASES:
        config, found = resolve(name), measured.get(name, {})
        cores = min(CASES[name]["processes"], start.devices_per_node)
        rows[name] = {
            "set": "calibration" if name in CALIBRATION else "held out",
            "processes": CASES[name]["processes"],
            "memory": found.get("memory"),
            "memory_predicted": peaks[name] + process_bytes,
            "time": found.get("time"),
            "time_predicted": predict(config, fitted).step_s,
            "time_measured_rates": predict(config, start).step_s,
            "time_one_rate": useful_flops(config) / rate / cores,
        }
    return {
        "measured_hardware": dataclasses.asdict(start),
        "calibrated_hardware": dataclasses.asdict(fitted),
        "process_bytes": process_bytes,
        "cases": rows,
        "published": published(),
    }


def dense(hidden: int, layers: int, heads: int, vocab: int, window: int, **rest: Any) -> RunConfig:
    """A run of full attention on GPUs; a GELU feed-forward of 4 hidden sizes has the parameters of a SwiGLU of 8/3."""
    parallel = {name: rest.pop(name) for name in list(rest) if name.endswith(("_size", "_stage"))}
    if parallel.get("tensor_size", 1) > 1:
        parallel["sequence_parallel"] = rest.pop("sequence", False)
    ffn = rest.pop("ffn", 8 * hidden // 3 // 64 * 64)
    model = {"vocab_size": vocab, "hidden_size": hidden, "num_layers": layers, "num_heads": heads, "ffn_size": ffn}
    model |= {"attention": {"kind": "full"}, "num_kv_heads": rest.pop("kv_heads", heads)}
    train = {"window_tokens": window, "max_steps": 1, "precision": "bf16", "carry_memory": False, **rest}
    tree = {"model": model, "data": {"train": "-"}, "train": train, "optim": {"warmup_steps": 0}}
    return validate({**tree, "parallel": parallel})


def published() -> list[dict[str, Any]]:
    """Tokens per second and device of published runs of other programs, and the prediction for each."""
    return [*_megatron(), *_torchtitan(), *_mpt()]


def _megatron() -> Iterator[dict[str, Any]]:
    """arXiv 2104.04473, table 1: TFLOP/s a GPU, recomputation included.

    96 B s l h^2 (1 + s / 6h + V / 16lh) operations per step (equation 3).
    """
    for size, hidden, layers, heads, tensor, gpus, batch, tflops in (
        ("1.7B", 2304, 24, 24, 1, 32, 512, 137),
        ("3.6B", 3072, 30, 32, 2, 64, 512, 138),
        ("7.5B", 4096, 36, 32, 4, 128, 512, 142),
        ("18.4B", 6144, 40, 48, 8, 256, 1024, 135),
    ):
        data = gpus // tensor
        config = dense(
            hidden,
            layers,
            heads,
            51200,
            2048,
            batch_lanes=batch,
            micro_batch_lanes=math.gcd(batch // data, 8),
            activation_checkpointing="layer",
            tensor_size=tensor,
            data_size=data,
        )
        flops = 96 * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
        yield _compare(f"Megatron-LM GPT {size}, {gpus} A100", config, "a100", 2048 * tflops * 1e12 / flops)


def _torchtitan() -> Iterator[dict[str, Any]]:
    """Its benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3, without compile."""
    for gpus, tokens_s in ((8, 5762), (128, 5605)):
        config = dense(
            4096,
            32,
            32,
            128256,
            8192,
            batch_lanes=2 * gpus,
            micro_batch_lanes=2,
            ffn=14336,
            kv_heads=8,
            data_size=gpus,
            zero_stage=3,
        )
        yield _compare(f"torchtitan Llama 3.1 8B, {gpus} H100", config, "h100", tokens_s)


def _mpt() -> Iterator[dict[str, Any]]:
    """scripts/train/benchmarking/README.md of mosaicml/llm-foundry: FSDP on one node, windows of 2048 tokens."""
    sizes = {"1B": (2048, 24, 16), "7B": (4096, 32, 32), "13B": (5120, 40, 40), "30B": (7168, 48, 56)}
    for size, device, micro, count, checkpointed, tokens_s in (
        ("1B", "a100", 14, 4, False, 20513),
        ("7B", "a100", 6, 2, False, 4641),
        ("13B", "a100", 2, 3, False, 2262),
        ("30B", "a100", 3, 21, True, 916),
        ("1B", "h100", 14, 1, False, 45455),
        ("7B", "h100", 6, 1, False, 10643),
        ("13B", "h100", 2, 1, False, 4792),
        ("30B", "h100", 3, 21, True, 2002),
    ):
        config = dense(
            *sizes[size],
            50368,
            2048,
            batch_lanes=8 * micro * count,
            micro_batch_lanes=micro,
            activation_checkpointing="layer" if checkpointed else "none",
            data_size=8,
            zero_stage=3,
        )
        yield _compare(f"llm-foundry MPT {size}, 8 {device.upper()}", config, device, tokens_s)


def _compare(name: str, config: RunConfig, hardware: str, tokens_s: float) -> dict[str, Any]:
    found = predict(config, load_hardware(hardware))
    processes = config.parallel.model_size * (config.parallel.data_size or 1)
    mine = found.tokens_s / processes
    return {"run": name, "published": tokens_s, "predicted": mine, "mfu": found.mfu}


def tables(errors: dict[str, Any]) -> str:
    """Markdown: memory, time, published runs."""
    lines = [
        "| Case | Set | Ranks | Memory (MB) | predicted | error | Step (s) | predicted | error"
        " | measured rates | one rate |"
    ]
    lines.append("|---|---|---:|" + "---:|" * 8)
    for name, row in errors["cases"].items():
        cells = [f"{row['memory'] / 1e6:.1f}" if row["memory"] else "-", f"{row['memory_predicted'] / 1e6:.1f}"]
        cells.append(_error(row["memory_predicted"], row["memory"]))
        has_time = row["time"] is not None
        cells += [f"{row['time']:.3f}" if has_time else "-", f"{row['time_predicted']:.3f}" if has_time else "-"]
        cells += [_error(row[f"time_{form}"], row["time"]) for form in ("predicted", "measured_rates", "one_rate")]
        lines.append(f"| {name} | {row['set']} | {row['processes']} | {' | '.join(cells)} |")
    lines += ["", summary(errors), "", "| Published run | tokens/s a GPU | predicted | error | predicted MFU |"]
    lines.append("|---|---:|---:|---:|---:|")
    for row in errors["published"]:
        ratio = _error(row["predicted"], row["published"])
        lines.append(
            f"| {row['run']} | {row['published']:,.0f} | {row['predicted']:,.0f} | {ratio} | {row['mfu']:.1%} |"
        )
    return "\n".join(lines)


def _error(predicted: float, measured: float | None) -> str:
    return "-" if not measured else f"{predicted / measured - 1:+.1%}"


def summary(errors: dict[str, Any]) -> str:
    """Largest and median errors of the held-out cases."""
    parts = []
    shared = errors["measured_hardware"]["devices_per_node"]
    for what, key, limit in (
        ("memory", "memory_predicted", 0.1),
        ("time", "time_predicted", 0.2),
        ("time with measured rates", "time_measured_rates", 0.2),
        ("time with one rate", "time_one_rate", 0.2),
    ):
        measured = "memory" if what == "memory" else "time"
        rows = [row for row in errors["cases"].values() if row["set"] == "held out" and row[measured]]
        if measured == "time":
            rows = [row for row in rows if row["processes"] <= shared]
        found = [abs(row[key] / row[measured] - 1) for row in rows]
        if found:
            within = sum(each <= limit for each in found)
            parts.append(
                f"{what}: median {statistics.median(found):.1%}, largest {max(found):.1%},"
                f" {within} of {len(found)} within {limit:.0%}"
            )
    return f"Held out, without the cases that share cores for time: {'; '.join(parts)}."


def report() -> None:
    """Writes errors.json and the tables of docs/results/plan.md."""
    prepare()
    errors = find_errors(read("measured.json"))
    write("errors.json", errors)
    PAGE.write()
    print(tables(errors))


PAGE = ResultPage("plan", "benchmarks/plan.py", {"plan accuracy": lambda: tables(read("errors.json"))})
