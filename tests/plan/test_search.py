"""The search's closed forms against the modules, hardware descriptions, and the schedule's formulas."""

import dataclasses
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infini_train.cli import main
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, validate
from infini_train.config.run import RunConfig, divide_processes
from infini_train.parallel import device, mesh
from infini_train.plan import measure, rehearsal, traffic
from infini_train.plan.dry_run import dry_run
from infini_train.plan.hardware import Hardware, load_hardware, validate_hardware
from infini_train.plan.parts import find_parts
from infini_train.plan.peak import find_peak, in_flight
from infini_train.plan.rehearsal import find_costs
from infini_train.plan.search import enumerate_layouts, fullest, search
from infini_train.plan.timing import collective_seconds, predict

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "hardware").glob("*.yaml"))
LAYOUTS: list[dict[str, Any]] = [
    {"tensor_size": 2, "sequence_parallel": True, "data_size": 2},
    {"tensor_size": 4, "data_size": 2},
    {"pipeline_size": 2, "virtual_stages": 2, "context_size": 2, "data_size": 1},
    {"context_size": 2, "zero_stage": 3, "data_size": 2},
    {"zero_stage": 2, "data_size": 4, "offload_optimizer": True},
]


@pytest.fixture(scope="module", autouse=True)
def real_groups() -> Iterator[None]:
    """A dry run leaves the groups that other tests of this process may have joined."""
    device.prepare()
    yield
    mesh.start()


def make_config(parallel: dict[str, Any], **train: Any) -> RunConfig:
    model = {"vocab_size": 2048, "hidden_size": 64, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96}
    attention = {"kind": "infini", "segment_tokens": 16, "overlap_tokens": 4}
    return validate(
        {
            "model": {**model, "qk_norm": True, "qkv_bias": True, "attention": attention},
            "data": {"train": "-"},
            "train": {"window_tokens": 64, "batch_lanes": 8, "micro_batch_lanes": 1, "max_steps": 1, **train},
            "optim": {"warmup_steps": 0},
            "parallel": parallel,
        }
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(layout))
def test_parts_are_what_the_modules_hold(layout: dict[str, Any], precision: str) -> None:
    config = make_config(layout, precision=precision)
    plan = dry_run(config)
    for rank, part in zip(plan.ranks, find_parts(plan.config), strict=True):
        assert tuple((stage.first_layer, stage.last_layer) for stage in part.stages) == rank.layers
        assert (part.parameters, part.device, part.host) == (rank.parameters, rank.device, rank.host)
        assert part.carried_bytes == rank.carried_bytes
        costs = find_costs(plan.config, on_cuda=True)
        assert find_peak(plan.config, costs, part, part.device, part.carried_bytes) == rank.memory


# ------------------------------------------------------------------------------------------------------------ hardware


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.devices_per_node == 8 and hardware.device == "cuda" and hardware.bf16_tflops > 300


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"memory_gb": -1.0}, "memory_gb: must be positive"),
        ({"matmul_efficiency": 1.5}, "matmul_efficiency: is a share"),
        ({"reduce_scatter_efficiency": 0.0}, "reduce_scatter_efficiency: must be positive"),
        ({"node_gb_s": 1e-320}, "node_gb_s: must be positive"),
        ({"bf16_tflops": 1e300}, "bf16_tflops: Input should be less than or equal to"),
        ({"devices_per_node": 10**30}, "devices_per_node: a number of more than 64 bits"),
        ({"name": "a\ud800"}, "name: .* holds a character that no text here may have"),
        ({"reserved_gb": 90.0}, "reserved_gb: 90 leaves nothing"),
        ({"speed": 3}, "speed: unknown key; known: name"),
        ({"launch_us": "fast"}, "launch_us: Input should be a valid number"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, Any], error: str) -> None:
    tree = dataclasses.asdict(load_hardware("h100"))
    with pytest.raises(ConfigError, match=f"mine.yaml: {error}"):
        validate_hardware({**tree, **change}, "mine.yaml")
    del tree["memory_gb"]
    with pytest.raises(ConfigError, match="memory_gb: is missing"):
        validate_hardware(tree, "mine.yaml")


# ---------------------------------------------------------------------------------------------------------------- time


def ideal(**changes: Any) -> Hardware:
    """Infinitely fast but for products of matrices."""
    fast = {"memory_gb_s": 1e9, "node_gb_s": 1e9, "network_gb_s": 1e9, "launch_us": 0.0}
    fast |= {"node_latency_us": 0.0, "network_latency_us": 0.0, "attention_efficiency": 1.0, "matmul_efficiency": 1.0}
    return dataclasses.replace(load_hardware("h100"), **{**fast, "short_attention_efficiency": 1.0, **changes})


def test_the_bubble_is_that_of_the_schedules() -> None:
    """(p - 1) / m of the work for 1F1B, and a virtual-stage-th of it with interleaving; equal stages, tiny ends."""
    base = make_config({"pipeline_size": 4, "data_size": 1})
    model = dataclasses.replace(base.model, num_layers=16, vocab_size=8)
    for virtual in (1, 2, 4):
        parallel = dataclasses.replace(base.parallel, virtual_stages=virtual)
        found = predict(dataclasses.replace(base, model=model, parallel=parallel), ideal())
        share = 3 / (8 * virtual)
        assert found.bubble == pytest.approx(share / (1 + share), rel=0.05)


def test_gradients_of_zero_3_are_there_from_the_start() -> None:
    """DeepSpeed allocates them with the engine, so that the backward of a lone micro-batch finds them, too."""
    config = make_config({"data_size": 8, "zero_stage": 3}, window_tokens=4096)
    part, costs = find_parts(config)[0], find_costs(config, on_cuda=True)
    found = find_peak(config, costs, part, part.device, part.carried_bytes)
    bucket = found.buckets / 2  # allocated, and not copied yet
    beginning = found.states + found.carried + found.activations + found.buffers + bucket
    assert part.device.gradients > 0 and found.peak == beginning + max(found.logits, found.working)


def test_in_flight_micro_batches() -> None:
    config = make_config({"pipeline_size": 4, "data_size": 1})
    assert [in_flight(config, stage) for stage in range(4)] == [4, 3, 2, 1]


def test_times_follow_the_hardware() -> None:
    config = divide_processes(load_run("8b"), 8)
    h100, h200, a100 = (predict(config, load_hardware(name)) for name in ("h100", "h200", "a100"))
    assert h200.step_s < h100.step_s < a100.step_s
    assert sum(h100.seconds.values()) == pytest.approx(h100.step_s)
    assert h100.tokens_s == pytest.approx(config.train.tokens_per_step / h100.step_s)
    assert 0 < h100.mfu < 1


def test_each_collective_has_its_rate() -> None:
    """Half the rate of one kind is twice its time, and changes nothing else."""
    config = make_config({"tensor_size": 2, "sequence_parallel": True, "pipeline_size": 2, "data_size": 2})
    hardware = dataclasses.replace(load_hardware("h100"), node_latency_us=0.0)
    costs, part = find_costs(config, on_cuda=True), find_parts(config)[0]
    found = {each.kind: each for each in traffic.find_collectives(config, costs, part)}
    assert set(found) == {"all-reduce", "all-gather", "reduce-scatter", "send"}
    for slow in found:
        field = f"{slow.replace('-', '_')}_efficiency"
        slower = dataclasses.replace(hardware, **{field: getattr(hardware, field) / 2})
        for kind, each in found.items():
            ratio = collective_seconds(each, slower) / collective_seconds(each, hardware)
            assert ratio == pytest.approx(2 if kind == slow else 1)


def test_attention_has_a_rate_for_short_and_for_long_segments() -> None:
    hardware = ideal(bf16_tflops=100.0, attention_efficiency=0.5, short_attention_efficiency=0.2)
    rates = [hardware.attention_flops("bf16", keys) / 1e12 for keys in (16, 64, 128, 256, 4096)]
    assert rates == pytest.approx([20, 20, 35, 50, 50])
    config = make_config({})
    long = dataclasses.replace(config.model, attention=dataclasses.replace(config.model.attention, segment_tokens=32))
    spent = [predict(dataclasses.replace(config, model=model), hardware).seconds for model in (config.model, long)]
    assert spent[1]["attention"] == pytest.approx(spent[0]["attention"] * (32 + 4) / (16 + 4))  # both are short


@pytest.mark.slow
def test_a_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own processes; small products only."""
    monkeypatch.setattr(measure, "MATMUL_SIZES", (64, 256))
    threads = torch.get_num_threads()
    main(["plan", "--measure", str(tmp_path / "mine.yaml")])
    torch.set_num_threads(threads)
    found = load_hardware(str(tmp_path / "mine.yaml"))
    shares = [found.all_reduce_efficiency, found.all_gather_efficiency, found.reduce_scatter_efficiency]
    assert max(*shares, found.send_efficiency) == 1.0
    config = divide_processes(load_run("debug"), 1)
    assert 0 < predict(config, found).step_s < 60


# -------------------------------------------------------------------------------------------------------------- search


def test_a_search_ranks_what_fits() -> None:
    base, hardware = load_run("1b"), load_hardware("h100")
    found = search(base, hardware, 8)
    assert found.valid > found.fitting == len(found.candidates) > 10
    assert all(each.peak_bytes <= hardware.usable_bytes for each in found.candidates)
    times = [each.prediction.step_s for each in found.candidates]
    assert times[0] <= min(times) * 1.03
    best = found.candidates[0]
    assert load_run("1b", best.overrides(base)) == best.config
    layouts = [config.parallel for config in enumerate_layouts(base, hardware, 8)]
    assert all(each.model_size * (each.data_size or 1) == 8 for each in layouts)


def test_a_search_says_what_is_wrong() -> None:
    small = dataclasses.replace(load_hardware("h100"), memory_gb=8.0)
    with pytest.raises(ConfigError, match=r"layouts: none of \d+ fits: the smallest needs"):
        search(load_run("8b"), small, 8)
    with pytest.raises(ConfigError, match="layouts: none divides"):
        search(load_run("debug"), load_hardware("h100"), 7)


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("1b", 8),
        ("8b", 32),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("1b", 32), ("3b", 8), ("3b", 32), ("8b", 8))),
    ],
)
def test_shipped_runs_fit_and_are_not_clearly_beaten(name: str, world_size: int) -> None:
    """About a tenth is what a layout that leaves memory to spare may cost (8b on 4 nodes: 10.4 %)."""
    base, hardware = load_run(name, (), world_size), load_hardware("h100")
    processes = base.parallel.model_size * (base.parallel.data_size or 1)
    own = predict(base, hardware)
    assert fullest(base, hardware, find_parts(base)) < 0.8 * hardware.usable_bytes
    bound = 1.11 if (name, world_size) == ("8b", 32) else 1.1
    assert own.step_s < bound * search(base, hardware, processes).candidates[0].prediction.step_s


def test_the_tables_of_the_docs_are_those_of_the_code() -> None:
    """Mend them with: python docs/generate_sizes.py, python benchmarks/plan.py --report."""
    root = Path(__file__).parents[2]
    sizes = runpy.run_path(str(root / "docs" / "generate_sizes.py"))
    page = (root / "docs" / "slurm.md").read_text(encoding="utf-8")
    assert sizes["fill"](page) == page
    errors = json.loads((root / "benchmarks" / "results" / "plan" / "errors.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "results" / "plan.md").read_text(encoding="utf-8")
    for name, case in errors["cases"].items():
        assert f"| {name} | {case['set']} | {case['processes']} |" in page


def test_the_commands_output(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "1b", "--search", "--top", "2"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:8])) <= 120 and "1: --set " in text
    main(["plan", "1b", "--search", "--top", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["candidates"]) == 2 and found["config"]["peak_bytes"] > 0
    main(["plan", "debug", "--hardware", "a100"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120 and "predicted on A100" in text


def test_a_search_runs_equal_layers_once() -> None:
    """Pipeline, data, micro-batches, ZeRO and recomputation need no modules of their own: that keeps a search fast."""
    base, hardware = load_run("1b"), load_hardware("h100")
    rehearsal._extrapolate.cache_clear()
    rehearsal._rehearse.cache_clear()
    found = search(base, hardware, 8)
    layouts = [config.parallel for config in enumerate_layouts(base, hardware, 8)]
    shapes = {(each.tensor_size, each.context_size) for each in layouts}
    assert len(shapes) <= rehearsal._rehearse.cache_info().misses <= 3 * len(shapes) < found.valid
