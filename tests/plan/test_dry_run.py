"""Every number of a plan against closed formulas, and the sums over all ranks against the single process."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infini_train.checkpoint.contents import format_size
from infini_train.cli import main
from infini_train.config.attention import FullConfig, InfiniConfig, MixedConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_model, to_tree, validate
from infini_train.config.model import ModelConfig
from infini_train.config.run import RunConfig
from infini_train.model.flops import count_parameters, memory_numbers
from infini_train.model.transformer import Transformer
from infini_train.parallel import device, mesh
from infini_train.plan.dry_run import Plan, RankPlan, dry_run
from infini_train.plan.table import format_plan

SHIPPED = (path.stem for path in (Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
MODELS = sorted({*SHIPPED} - {"passkey", "stories"})  # these carry an overlap too
SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=48,
    num_layers=5,
    num_heads=8,
    num_kv_heads=2,
    head_dim=6,
    value_head_dim=4,
    ffn_size=64,
    qkv_bias=True,
    qk_norm=True,
    attention=InfiniConfig(segment_tokens=8, overlap_tokens=3),
)


@pytest.fixture(scope="module", autouse=True)
def real_groups() -> Iterator[None]:
    """A dry run leaves the groups that other tests of this process may have joined."""
    device.prepare()
    yield
    mesh.start()


def make_run(model: ModelConfig, lanes: int = 8, **sections: dict[str, Any]) -> RunConfig:
    """A run of this model; nothing of its data exists."""
    train = {"window_tokens": 32 * (model.segment_tokens or 1), "batch_lanes": lanes, "max_steps": 1}
    return validate(
        {
            "model": to_tree(model),
            "data": {"train": "nowhere"},
            "optim": {"warmup_steps": 0},
            **sections,
            "train": {**train, **sections.get("train", {})},
        }
    )


def change(model: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig(**{**vars(model), **changes})


# ------------------------------------------------------------------------------------------------------ closed formulas


def count_rank_parameters(model: ModelConfig, tensor: int, layers: int, embeds: bool, predicts: bool) -> int:
    """Parameters of one rank, term by term; key-value projections that can't be divided are whole on every rank."""
    width, key, value = model.hidden_size, model.key_dim, model.value_dim
    heads = model.num_heads // tensor
    kv = model.kv_heads // tensor if model.kv_heads >= tensor else model.kv_heads
    qkv = heads * key + kv * (key + value)
    layer = width * qkv + heads * value * width + 3 * width * (model.ffn_size // tensor) + 2 * width
    layer += qkv * model.qkv_bias + 2 * key * model.qk_norm
    layer += heads + model.attention.conv_tokens * width if isinstance(model.attention, InfiniConfig) else 0
    rows = model.vocab_size // tensor * width
    ends = rows * embeds + (rows * (not model.tied_embeddings) + width) * predicts
    return layers * layer + ends


def check_rank(config: RunConfig, rank: RankPlan) -> None:
    """Everything that has a formula, under bf16 (so ZeRO 2)."""
    model, parallel = config.model, config.parallel
    tensor, ranks = parallel.tensor_size, (parallel.data_size or 1) * parallel.context_size
    stage = rank.place.pipeline[0]
    layers = sum(stop - first for first, stop in rank.layers)
    parameters = count_rank_parameters(model, tensor, layers, stage == 0, stage == parallel.pipeline_size - 1)
    assert rank.parameters == parameters
    assert parameters <= rank.device.weights / 2 <= parameters + 3 * 2 * ranks  # three groups, each filled up
    assert rank.device.masters == 4 * rank.device.weights / 2 / ranks == rank.device.gradients
    assert rank.device.moments == 2 * rank.device.masters and rank.host.total == 0
    kv = max(1, model.kv_heads // tensor)
    lane = 4 * (kv * model.key_dim * (model.value_dim + 1) + 1) * layers
    assert (rank.carried_lane_bytes, rank.carried_bytes) == (lane, lane * config.lanes_per_rank)
    sent = (parallel.context_size - 1) * lane // layers
    assert rank.sent_bytes == (sent, sent)
    stop = config.train.window_tokens // parallel.context_size
    assert (rank.tokens, rank.lanes) == ((0, stop), (0, config.lanes_per_rank))
    assert (rank.heads, rank.kv_heads) == ((0, model.num_heads // tensor), (0, kv))
    rows = (0, model.vocab_size // tensor)
    assert rank.embedding_rows == (rows if stage == 0 else None)
    assert rank.head_rows == (rows if stage == parallel.pipeline_size - 1 else None)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "context", "data"), [(1, 1, 1, 1), (2, 1, 1, 4), (2, 2, 2, 2), (1, 2, 4, 2), (2, 1, 4, 1)]
)
def test_shipped_models_count_as_the_formulas(name: str, tensor: int, pipeline: int, context: int, data: int) -> None:
    model = load_model(name)
    pipeline = 1 if model.tied_embeddings else pipeline
    layout = {"tensor_size": tensor, "pipeline_size": pipeline, "context_size": context, "data_size": data}
    config = make_run(model, train={"precision": "bf16"}, parallel=layout)
    plan = dry_run(config)
    assert plan.world_size == tensor * pipeline * context * data
    assert plan.parameters == count_parameters(model)
    assert plan.carried_lane_bytes == 4 * (memory_numbers(model) + model.num_layers)
    assert plan.checkpoint_bytes == 12 * plan.parameters + 8 * plan.carried_lane_bytes
    assert len(plan.ranks) == pipeline
    for rank in plan.ranks:
        check_rank(plan.config, rank)


def test_the_memory_of_an_8b_model() -> None:
    """d_k (d_v + 1) K l fp32 numbers: 17 MB a lane with 8 key-value heads."""
    assert dry_run(make_run(load_model("8b")), ranks=()).carried_lane_bytes == 4 * (128 * 129 * 8 * 32 + 32)
    assert pytest.approx(17e6, rel=0.01) == 4 * 128 * 129 * 8 * 32


def test_a_large_cluster_is_planned_fast() -> None:
    layout = {"tensor_size": 8, "sequence_parallel": True, "pipeline_size": 4, "context_size": 2}
    plan = dry_run(make_run(load_model("8b"), 64, train={"precision": "bf16"}, parallel=layout), 512)
    assert [rank.rank for rank in plan.ranks] == [0, 128, 256, 384]
    assert [rank.parameters for rank in plan.ranks] == [283_836_448, 218_169_376, 218_169_376, 283_840_544]
    for rank in plan.ranks:
        check_rank(plan.config, rank)


# ------------------------------------------------------------------------------------------------------ sums over ranks

UNTIED, TIED = SMALL, change(SMALL, tied_embeddings=True)
DELTA = change(SMALL, attention=InfiniConfig(segment_tokens=8, update="delta"))
LAYOUTS = [
    (UNTIED, {"tensor_size": 2}, "fp32", 2),
    (UNTIED, {"tensor_size": 4, "sequence_parallel": True}, "bf16", 4),  # fewer key-value heads than ranks
    (TIED, {"tensor_size": 8}, "fp32", 8),
    (UNTIED, {"pipeline_size": 3}, "bf16", 3),  # uneven layers
    (UNTIED, {"pipeline_size": 2, "virtual_stages": 2}, "fp32", 4),
    (UNTIED, {"context_size": 4}, "bf16", 4),
    (TIED, {"context_size": 2, "zero_stage": 2}, "fp32", 4),
    (TIED, {"zero_stage": 3}, "bf16", 8),
    (UNTIED, {"tensor_size": 4, "zero_stage": 3}, "fp32", 8),
    (UNTIED, {"tensor_size": 2, "pipeline_size": 2, "context_size": 2}, "bf16", 8),
    (DELTA, {"tensor_size": 2, "context_size": 2}, "fp32", 8),
]


def cover(spans: list[tuple[int, int]]) -> list[int]:
    return sorted(number for first, stop in set(spans) for number in range(first, stop))


@pytest.mark.parametrize(("model", "layout", "precision", "world_size"), LAYOUTS)
def test_all_ranks_together_are_the_model(
    model: ModelConfig, layout: dict[str, Any], precision: str, world_size: int
) -> None:
    config = make_run(model, 32, train={"precision": precision, "micro_batch_lanes": 1}, parallel=layout)
    plan = dry_run(config, world_size, range(world_size))
    ranks = plan.ranks
    assert sum(rank.owned_parameters for rank in ranks) == plan.parameters == count_parameters(model)
    assert sum(rank.checkpoint_bytes for rank in ranks) == plan.checkpoint_bytes
    assert cover([span for rank in ranks for span in rank.layers]) == list(range(model.num_layers))
    assert cover([rank.heads for rank in ranks]) == list(range(model.num_heads))
    assert cover([rank.kv_heads for rank in ranks]) == list(range(model.kv_heads))
    assert cover([rank.tokens for rank in ranks]) == list(range(config.train.window_tokens))
    assert cover([rank.lanes for rank in ranks]) == list(range(32))
    for rows in ([rank.embedding_rows for rank in ranks], [rank.head_rows for rank in ranks]):
        assert cover([span for span in rows if span]) == list(range(model.vocab_size))
    carried = sum(rank.carried_bytes for rank in ranks)
    assert carried >= 32 * plan.carried_lane_bytes  # copies of context-parallel ranks and of shared key-value heads


def test_sequence_parallelism_and_offload_move_no_parameter() -> None:
    layout = {"tensor_size": 2, "data_size": 2}
    plain = dry_run(make_run(SMALL, parallel=layout)).ranks[0]
    other = dry_run(make_run(SMALL, parallel={**layout, "sequence_parallel": True, "offload_optimizer": True})).ranks[0]
    assert (plain.parameters, plain.device.weights) == (other.parameters, other.device.weights)
    assert (plain.device.masters, plain.device.moments) == (other.host.masters, other.host.moments)
    assert other.device.masters == other.device.moments == plain.host.total == 0


def test_what_context_parallelism_sends() -> None:
    """docs/context-parallel.md: delta adds K d_k d_k; the overlap goes to the right neighbour, the last one to all."""
    for update, extra in (("linear", 0), ("delta", 2 * 6 * 6)):
        model = change(SMALL, attention=InfiniConfig(segment_tokens=8, overlap_tokens=3, update=update))
        first, *_, last = dry_run(make_run(model, parallel={"context_size": 4}), ranks=range(4)).ranks
        memory, overlap = 3 * 4 * (2 * 6 * 5 + 1 + extra), 4 * 3 * 2 * (6 + 4)
        assert first.sent_bytes == (memory + overlap, memory)
        assert last.sent_bytes == (memory + overlap, memory + overlap)
    near = change(SMALL, attention=InfiniConfig(segment_tokens=8, conv_tokens=3))
    first, *_, last = dry_run(make_run(near, parallel={"context_size": 4}), ranks=range(4)).ranks
    plain = dry_run(make_run(change(SMALL, attention=InfiniConfig(segment_tokens=8))), ranks=()).carried_lane_bytes
    kept = dry_run(make_run(near), ranks=()).carried_lane_bytes
    assert kept - plain == 4 * 3 * SMALL.hidden_size * SMALL.num_layers
    memory, tail = 3 * 4 * (2 * 6 * 5 + 1), 4 * 3 * SMALL.hidden_size
    assert first.sent_bytes == (memory + tail, memory) and last.sent_bytes == (memory + tail, memory + tail)


MIXED = MixedConfig(
    variants={"memory": InfiniConfig(segment_tokens=8, update="delta"), "whole": FullConfig()},
    pattern=("memory", "whole"),
)


def keys_and_values(model: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of them that the full layers of a real model hold after a text of one lane."""
    mesh.start()
    transformer = Transformer(model).to(dtype)
    marks = torch.zeros(1, tokens, dtype=torch.bool), torch.ones(1, tokens)
    with torch.no_grad():
        grids = transformer.make_grids(*marks, None)
        _, state = transformer.decode(torch.zeros(1, tokens, dtype=torch.int64), grids, None)
    full = [each for each, layer in zip(state, model.layers, strict=True) if isinstance(layer, FullConfig)]
    return sum(each.k_BKRD.nbytes + each.v_BKRE.nbytes for each in full)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_full_layers_keep_is_that_of_a_real_state(precision: str, dtype: torch.dtype) -> None:
    model = change(SMALL, attention=MIXED)
    plan = dry_run(make_run(model, train={"precision": precision}))
    assert plan.caching_layers == (1, 3)
    found = {tokens: keys_and_values(model, tokens, dtype) for tokens in (256, 1024)}
    assert found == {tokens: tokens * plan.cached_token_bytes[precision] for tokens in found}
    assert plan.carried_lane_bytes == 3 * 4 * (2 * 6 * 5 + 1)  # the memories alone: windows stand alone for the others
    lines = format_plan(plan).splitlines()
    window = format_size(found[256])  # make_run's window
    assert f"keys and values         layers 1, 3: {window} a lane and window, within activations kept" in lines
    one, thousand, million = (format_size(found[1024] * tokens // 1024) for tokens in (1, 1024, 2**20))
    texts = f"{one} a token and lane: {thousand} at 1K tokens, {million} at 1M"
    assert f"kept when reading, {precision} {texts}" in lines
    assert json.loads(json.dumps(plan.to_json()))["caching_layers"] == [1, 3]


def test_a_stack_of_constant_size_has_no_such_lines() -> None:
    text = format_plan(dry_run(make_run(SMALL)))
    assert "keys and values" not in text and "when reading" not in text


def test_nothing_is_carried_without_carry_memory() -> None:
    kept, forgotten = (dry_run(make_run(SMALL, train={"carry_memory": carry})) for carry in (True, False))
    assert kept.ranks[0].carried_bytes == 8 * kept.carried_lane_bytes
    assert forgotten.ranks[0].carried_bytes == 0
    assert forgotten.checkpoint_bytes == kept.checkpoint_bytes - 8 * kept.carried_lane_bytes == 12 * kept.parameters


# ------------------------------------------------------------------------------------------------ notes, table, command


def notes(**sections: Any) -> str:
    return "\n".join(dry_run(make_run(SMALL, **sections), ranks=()).notes)


def test_notes_say_what_is_wasted() -> None:
    assert notes() == ""
    assert "2 ranks hold and compute each memory" in notes(parallel={"tensor_size": 4})
    found = notes(parallel={"pipeline_size": 2})
    assert "have a layer more" in found and "1 micro-batch for parallel.pipeline_size 2" in found
    assert "divides nothing" in notes(parallel={"zero_stage": 2})


def small_plan(**sections: Any) -> Plan:
    return dry_run(make_run(SMALL, **sections))


def test_the_table_has_a_column_for_each_stage() -> None:
    text = format_plan(small_plan(parallel={"pipeline_size": 2, "virtual_stages": 2}, train={"micro_batch_lanes": 1}))
    rows = {line[:24].strip(): line[24:].split() for line in text.splitlines() if "note" not in line}
    assert rows["layers"] == ["0-1", "3", "2", "4"]  # two stages on each of two ranks
    assert rows["rank"] == rows["pipeline stage"] == ["0", "1"]
    assert len(rows["weights"]) == 4  # a number and its unit for each
    assert "sent, layer and lane" not in rows and "host: sum" not in rows


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--world-size", "3", "--set", "parallel.tensor_size=2"], "--world-size: 3 processes, but .* a multiple of 2"),
        (["--world-size", "4", "--set", "parallel.data_size=2"], "--world-size: 4 processes, but .* needs 2"),
        (["--world-size", "1000000000"], "--world-size: 1000000000 processes; at most 131072"),
        (["--world-size", "1000000000", "--search"], "--world-size: 1000000000 processes; at most 131072"),
        (["--nodes", "100000"], "--nodes: 800000 processes; at most 131072"),
        (["--set", "model.num_layers=1000000"], "model.num_layers: must be less than or equal to 1000"),
        (["--set", "train.window_tokens=1000000000000000"], "train.window_tokens: must be less than or equal to"),
        (["--world-size", "2", "--rank", "2"], "--rank: 2 is none of the 2 ranks"),
        (["--set", "parallel.tensor_size=3"], "model.num_heads: 4 can't be divided"),
        (["--world-size", "3", "--rank", "0"], "train.batch_lanes: 4 lanes can't be divided over 3"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "debug", *options])
    assert stopped.value.code == 2
    assert re.match(f"error: {error}.*\n$", capsys.readouterr().err)


def test_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "debug", "--world-size", "4", "--rank", "3", "--json", "--set", "parallel.context_size=2"])
    plan = json.loads(capsys.readouterr().out)
    assert (plan["world_size"], plan["parallel"]["data_size"]) == (4, 2)
    (rank,) = plan["ranks"]
    assert rank["place"]["context"] == rank["place"]["data"] == [1, 2]
    assert rank["tokens"] == [64, 128] and rank["lanes"] == [2, 4]


def test_a_negative_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="world_size"):
        dry_run(make_run(SMALL), 0)
