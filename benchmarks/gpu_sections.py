"""The sections of gpu_check.py: each gives its results one by one, as rows for JSON."""

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from infini_train.child_processes import ending_with_parent
from infini_train.config.attention import AttentionConfig, MixedConfig
from infini_train.config.model import ModelConfig
from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.model.init import initialise
from infini_train.model.layers import parallel_config
from infini_train.model.transformer import Transformer
from infini_train.ops import fla_kernels, varlen
from infini_train.ops.attention import local_attention
from infini_train.ops.gated_delta import empty_gated_memory
from infini_train.ops.grid import make_grid
from infini_train.parallel import device, mesh
from infini_train.selftest.cases import ATTENTIONS

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
# Of the whole gradient, relative; fp32 sums in another order, bf16 has steps of 0.4 to 0.8 %.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.06}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNSTEADY = ("memorizing",)  # in bf16 other tokens may be retrieved, which no tolerance describes
COMPILED = ("delta", "gated-token", "mixed")  # each takes up to a minute
LONG = ["train.window_tokens=32768", "train.batch_lanes=2"]
BIG = ["train.window_tokens=16384", "train.batch_lanes=2"]
TRAINED = {  # name of the model, then of the case: settings
    "125m": LONG,
    "350m": LONG,
    "1b": BIG,
    "1b, compiled": [*BIG, "train.compile=true"],
    "1b, delta": [*BIG, "model.attention.update=delta"],
}
TINY = [
    *("model.hidden_size=64", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_size=96"),
    *("model.vocab_size=512", "model.attention.segment_tokens=64", "train.window_tokens=256"),
]
STEPS = 8
HARDWARE = ("h100", "h200", "a100")


# ------------------------------------------------------------------------------------- every form, against the CPU


def check_forms(out: Path, rehearsed: bool) -> Iterator[Row]:
    """Losses, carried states and gradients of two windows, in each precision."""
    del out
    device.prepare()
    mesh.start()
    yield {"what": "machine", "device": device.describe(), "torch": torch.__version__}
    sizes = (32, 128) if rehearsed else (64, 512)
    names = ["delta", "mixed"] if rehearsed else list(ATTENTIONS)
    for name in names:
        config = enlarge(ATTENTIONS[name], sizes[0])
        weights, truth = None, None
        for precision, dtype in DTYPES.items():
            for compiled in (False, True):
                if compiled and (rehearsed or name not in COMPILED):
                    continue
                row: Row = {"what": "form", "form": name, "precision": precision, "compiled": compiled}
                try:
                    if weights is None:
                        weights = draw_weights(config)
                    if truth is None:
                        truth = find_outcome(config, weights, torch.device("cpu"), torch.float64, sizes[1])
                    found = find_outcome(config, weights, device.current(), dtype, sizes[1], compiled=compiled)
                    errors = {part: distance(found[part], truth[part]) for part in truth}
                    tolerance = math.inf if precision == "bf16" and name in UNSTEADY else TOLERANCES[precision]
                    right = all(math.isfinite(error) and error <= tolerance for error in errors.values())
                    yield {**row, "right": right, **errors}
                except Exception as error:  # noqa: BLE001 (one form that fails must not hide the others)
                    yield {**row, "right": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def enlarge(attention: AttentionConfig, segment_tokens: int) -> ModelConfig:
    """A small model of this form, with segments and heads that fast kernels take."""

    def longer(part: Any) -> Any:
        if isinstance(part, MixedConfig):
            variants = {name: longer(variant) for name, variant in part.variants.items()}
            return dataclasses.replace(part, variants=variants)
        changes = {"segment_tokens": segment_tokens} if getattr(part, "segment_tokens", None) else {}
        return dataclasses.replace(part, **changes)

    return ModelConfig(
        vocab_size=512,
        hidden_size=256,
        num_layers=2 if not isinstance(attention, MixedConfig) else len(attention.pattern),
        num_heads=4,
        num_kv_heads=2,
        ffn_size=512,
        attention=longer(attention),
    )


def draw_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Weights that bf16 can hold, gates among them, for all precisions alike."""
    model = Transformer(config)
    initialise(model, config, seed=0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.copy_(torch.randn(parameter.shape, generator=random))
    return {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}


def find_outcome(
    config: ModelConfig,
    weights: dict[str, Tensor],
    where: torch.device,
    dtype: torch.dtype,
    tokens: int,
    *,
    compiled: bool = False,
) -> dict[str, Tensor]:
    """Losses, states and gradients after two windows of two lanes, the second with carried states."""
    model = Transformer(config, parallel_config(dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.to(where)
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for layer in model.layers.values():
            layer.compile(dynamic=False)
    random, state, losses = torch.Generator().manual_seed(2), model.initial_state(2), []
    for window in range(2):
        ids, labels = torch.randint(0, config.vocab_size, (2, 2, tokens), generator=random)
        starts = torch.zeros(2, tokens, dtype=torch.bool)
        starts[0, tokens // 3] = starts[1, tokens // 2 + 1] = True
        starts[:, 0] = window == 0
        grids = model.make_grids(starts, torch.ones(2, tokens), state).to(where)
        factors = torch.full((2, tokens), 1 / (2 * tokens), device=where)
        loss, following = model(ids.to(where), grids, state, labels.to(where), factors)
        loss.backward()
        losses.append(loss.detach())
        state = model.carry_over(following)
    assert not compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"], "nothing was compiled"
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    floating = [leaf.double().cpu().flatten() for leaf in leaves if leaf.is_floating_point()]
    found = (parameter.grad for parameter in model.parameters())
    gradients = [gradient.double().cpu().flatten() for gradient in found if gradient is not None]
    return {
        "loss": torch.stack(losses).double().cpu(),
        "gradients": torch.cat(gradients),
        **({"states": torch.cat(floating)} if floating else {}),
    }


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative to the truth's length; infinite where anything is not finite."""
    if not found.isfinite().all():
        return float("inf")
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))


# ------------------------------------------------------------------------------------------------- kernels and layouts


def check_kernels(out: Path, rehearsed: bool) -> Iterator[Row]:
    """Which are taken for the heads of the shipped models, and local attention with and without the varlen kernel."""
    del out
    device.prepare()
    where = device.current()
    for size in (64, 128):
        k = torch.empty(1, 4, 4, 64, size, dtype=torch.bfloat16, device=where)
        memory = empty_gated_memory(1, 4, size, size, k, "token")
        yield {
            "what": "kernels",
            "head_dim": size,
            "varlen": varlen.find_kernel(where, torch.bfloat16, size, size) is not None,
            "flash_linear_attention": fla_kernels.find_kernel(k, memory) is not None,
        }
    tokens, segment = (256, 64) if rehearsed else (16384, 2048)
    found = varlen.find_kernel(where, torch.bfloat16, 128, 128)
    for kernel in (None, found) if found else (None,):
        row = {"what": "local attention", "runs": kernel is not None}
        yield {**row, **time_local(where, tokens, segment, kernel)}


def time_local(where: torch.device, tokens: int, segment: int, kernel: varlen.Kernel | None) -> Row:
    """Forward and backward of the local attention of one layer of 1b, documents of 1,500 tokens."""
    heads, kv_heads, size = 16, 8, 128
    starts = torch.zeros(1, tokens, dtype=torch.bool)
    starts[:, 100::1500] = True
    grid = make_grid(starts, torch.ones(1, tokens), None, segment, kernel=kernel).to(where)
    q_BHTD, k_BKTD, v_BKTD = (
        torch.randn(1, count, tokens, size, dtype=torch.bfloat16, device=where).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    seconds = []
    for _ in range(5):
        device.synchronise()
        begin = time.perf_counter()
        result = local_attention(q_BHTD, k_BKTD, v_BKTD, None, grid)[0]
        result.backward(torch.ones_like(result))
        device.synchronise()
        seconds.append(time.perf_counter() - begin)
    return {"first_ms": 1e3 * seconds[0], "ms": 1e3 * min(seconds[1:])}


def check_selftest(out: Path, rehearsed: bool) -> Iterator[Row]:
    """A row for each layout."""
    del out
    device.prepare()
    processes = device.count() if device.uses_cuda() else 1
    choice = ["--only", "one-delta-overlap-recompute"] if rehearsed else []
    lines = run_command(["selftest", "--json", "--nproc", str(processes), *choice]).splitlines()
    for line in lines:
        row = json.loads(line)
        if "case" in row:
            yield {"what": "layout", "case": row["case"], "right": row["passed"], "failure": row["failure"][:300]}


# ------------------------------------------------------------------------------------------------------------ training


def check_train(out: Path, rehearsed: bool) -> Iterator[Row]:
    """A few steps of the commands that users give, beside what the plan says of them."""
    for name, settings in TRAINED.items():
        if rehearsed and name != "1b, delta":
            continue
        row: Row = {"what": "train", "case": name}
        try:
            run = write_run(out, name, settings, rehearsed)
            planned = plan(run)
            run_command(["train", *run])
            found = read_speed(out / "run")
            yield {**row, "right": math.isfinite(found["last_loss"]), **found, "planned": planned}
        except Exception as error:  # noqa: BLE001 (one model that fails must not hide the others)
            said = getattr(error, "output", None) or f"{type(error).__name__}: {error}"
            yield {**row, "right": False, "error": str(said).strip()[-400:]}
        finally:
            shutil.rmtree(out / "run", ignore_errors=True)  # a checkpoint of 14 GB


def check_profile(out: Path, rehearsed: bool) -> Iterator[Row]:
    """The table that a profiled step of a run gives."""
    run_command(["train", *write_run(out, "1b", [*BIG, "log.profile_steps=[6]"], rehearsed)])
    (table,) = (out / "run" / "profile").glob("*.txt")
    yield {"what": "profile", "table": table.read_text(encoding="utf-8").splitlines()[:45]}


def write_run(out: Path, name: str, settings: list[str], rehearsed: bool) -> list[str]:
    """The arguments of a run over random text, in documents of some 1,500 tokens; never evaluated, saved at the end."""
    data, path = out / "data", out / "run.yaml"
    if not data.exists():
        text = bytes(torch.randint(32, 127, (1500,), generator=torch.Generator().manual_seed(0)).tolist())
        with ShardWriter(data, ByteTokenizer()) as writer:
            for number in range(400):
                ids = ByteTokenizer().encode(text[number:].decode() + text[:number].decode())
                writer.add(ids, n_bytes=len(text), id=str(number))
    path.write_text(yaml.safe_dump({"include": [f"model/{name.split(',')[0]}.yaml"], "name": "gpu_check"}))
    settings = [
        *settings,
        *("train.micro_batch_lanes=1", f"train.max_steps={STEPS}", "train.precision=bf16", "optim.warmup_steps=1"),
        *("checkpoint.every_steps=1000", "log.every_steps=1", "parallel.data_size=1"),
        *(f"data.train={data}", f"run_dir={out / 'run'}"),
        *(TINY if rehearsed else []),
    ]
    return [str(path), *(part for setting in settings for part in ("--set", setting))]


def plan(run: list[str]) -> Row | None:
    """What `infini-train plan` says of a run on this GPU; None for one that it does not know."""
    device.prepare()
    known = [name for name in HARDWARE if name.upper() in device.describe()]
    hardware = known[0] if known else None if device.uses_cuda() else "h100"  # in a rehearsal: any
    if hardware is None:
        return None
    said = json.loads(run_command(["plan", *run, "--json", "--world-size", "1", "--hardware", hardware]))
    predicted = {name: said["prediction"][name] for name in ("tokens_s", "mfu")}
    return {"hardware": hardware, **predicted, "peak_memory_bytes": said["ranks"][0]["memory"]["peak"]}


def read_speed(run: Path) -> Row:
    """Medians of the steps after the third, which no compiling holds up."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "speed/step_s" in row]
    names = ("speed/tokens_per_s", "speed/mfu", "seconds/data", "seconds/forward", "seconds/backward")
    names += ("seconds/optimizer", "speed/peak_memory_bytes")
    found = {name.split("/")[1]: statistics.median(row[name] for row in rows[3:]) for name in names}
    return {**found, "first_step_s": rows[0]["speed/step_s"], "last_loss": rows[-1]["loss/train"]}


# ----------------------------------------------------------------------------------------------------------- streaming


def check_stream(out: Path, rehearsed: bool) -> Iterator[Row]:
    """A pass key in a million tokens, by the shipped model: streamed, in constant memory."""
    length, samples = ("2K", "2") if rehearsed else ("1M", "3")
    found = out / "passkey"
    begin = time.perf_counter()
    arguments = ["--lengths", length, "--samples", samples, "--depths", "0.5", "--out", str(found)]
    run_command(["eval", "passkey", str(ROOT / "models" / "passkey-linear"), *arguments])
    results = json.loads((found / "results.json").read_text(encoding="utf-8"))
    cells = results["cells"]
    right = all(cell["exact"] == cell["samples"] for cell in cells)
    yield {"what": "stream", "length": length, "right": right, "took_s": time.perf_counter() - begin, "results": cells}


def run_command(arguments: list[str]) -> str:
    """What an `infini-train` command prints."""
    command = [sys.executable, "-m", "infini_train.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, preexec_fn=ending_with_parent()
    )
    if done.returncode != 0 and arguments[0] != "selftest":  # whose rows tell
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout + done.stderr)
    return done.stdout
