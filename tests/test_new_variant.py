"""A new variant of attention is its two classes and two lines of registration; a mixed stack is one config class.

Both are defined here, and nothing of the package knows them: they train, resume, evaluate, generate and are planned.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from infini_train.checkpoint.compat import resumable_fields
from infini_train.checkpoint.store import open_checkpoint, resolve
from infini_train.config.attention import KINDS, FullConfig, InfiniConfig, LocalConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, validate
from infini_train.config.model import ModelConfig
from infini_train.config.variant import AttentionVariant, LayerShape, TokenFlops
from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.inference.loading import open_trained
from infini_train.model.flops import count_parameters, forward_flops_per_token, memory_numbers
from infini_train.model.init import initialise
from infini_train.model.mixer import Figure, LayerSpec, SequenceMixer, head_gates
from infini_train.model.transformer import Transformer
from infini_train.model.variants import MIXERS
from infini_train.ops.grid import Grid
from infini_train.ops.state import Stored
from infini_train.parallel import device, mesh
from infini_train.plan import rehearsal


@dataclass(frozen=True, kw_only=True)
class AverageConfig(AttentionVariant):
    """A decaying average of the values so far, per key-value head."""

    kind: Literal["average"] = "average"
    decay: float = 0.9
    gate_init: float = 1.0

    has_gates: ClassVar[bool] = True
    initial: ClassVar[dict[str, str]] = {"gate_init": "an initial value"}

    def extra_parameters(self, shape: LayerShape) -> int:
        return shape.num_heads

    def memory_numbers(self, shape: LayerShape) -> int:
        return shape.kv_heads * shape.value_dim

    def mixing_flops(self, shape: LayerShape, window_tokens: int) -> TokenFlops:
        return TokenFlops(attention=2 * shape.kv_heads * shape.value_dim)


class AverageState(NamedTuple):
    average_BKE: Annotated[Tensor, Stored("average", "lanes kv_heads value_dim")]


class AverageAttention(SequenceMixer):
    figures = (Figure("size", "size of the average, by layer"),)

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.attention, AverageConfig)
        self.decay = spec.attention.decay
        self.gate = head_gates(spec.model, spec.parallel, spec.attention.gate_init)

    def initial_state(self, lanes: int, like: Tensor) -> AverageState:
        heads = self.projections.kv_shape(lanes)[1]
        return AverageState(like.new_zeros(lanes, heads, self.projections.value_dim))

    def forward(self, hidden_TBD: Tensor, state: AverageState | None, grid: Grid) -> tuple[Tensor, AverageState]:
        q_BHTD, k_BKTD, v_BKTE = self.projections.split(hidden_TBD)
        group = q_BHTD.shape[1] // k_BKTD.shape[1]
        shown_BHT = (q_BHTD * k_BKTD.repeat_interleave(group, 1)).sum(-1).tanh() * self.gate.sigmoid()[:, None]
        average_BKE = self.initial_state(hidden_TBD.shape[1], hidden_TBD).average_BKE if state is None else state[0]
        averages = []
        for t in range(v_BKTE.shape[2]):
            going_on_B11 = (grid.age_BT[:, t] > 0)[:, None, None]
            average_BKE = self.decay * average_BKE * going_on_B11 + v_BKTE[:, :, t]
            averages.append(average_BKE.repeat_interleave(group, 1))
        out_BHTE = torch.stack(averages, 2) * shown_BHT[..., None]
        return self.projections.join(out_BHTE), AverageState(average_BKE)

    def measure(self, state: AverageState) -> tuple[float]:
        return (state.average_BKE.norm(dim=-1).mean().item(),)


@dataclass(frozen=True, kw_only=True)
class TurnsConfig(AttentionVariant):
    """Layers of several kinds by turns: memory, full, local, with segments of other sizes."""

    kind: Literal["turns"] = "turns"

    def at(self, layer: int, num_layers: int) -> AttentionVariant:
        turns = (
            InfiniConfig(segment_tokens=8, overlap_tokens=3, conv_tokens=2, update="delta"),
            FullConfig(),
            LocalConfig(segment_tokens=4, overlap_tokens=2),
        )
        return turns[layer % 3]

    def memory_numbers(self, shape: LayerShape) -> int:
        raise AssertionError("asked of each layer")


@dataclass(frozen=True, kw_only=True)
class WideningConfig(AttentionVariant):
    """Layers whose modules and states look alike, and do different work."""

    kind: Literal["widening"] = "widening"

    def at(self, layer: int, num_layers: int) -> AttentionVariant:
        return LocalConfig(segment_tokens=8 if layer == 0 else 32)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(KINDS, "average", AverageConfig)
    monkeypatch.setitem(MIXERS, AverageConfig, AverageAttention)
    monkeypatch.setitem(KINDS, "turns", TurnsConfig)
    monkeypatch.setitem(KINDS, "widening", WideningConfig)
    monkeypatch.setattr(device, "MATMUL_PROBE_SIZE", 64)
    device.prepare()
    yield
    mesh.start()  # a plan leaves the groups that other tests of this process need


def write_shards(folder: Path, seed: int) -> Path:
    random = np.random.default_rng(seed)
    with ShardWriter(folder, ByteTokenizer()) as writer:
        for number, length in enumerate((50, 90, 31, 120, 64)):
            writer.add(random.integers(97, 123, length), n_bytes=length, id=f"document {number}")
    return folder


@pytest.fixture(params=["average", "turns"])
def run_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tree = {
        "name": "new",
        "run_dir": str(tmp_path / "whole"),
        "model": {
            **{"vocab_size": 259, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2},
            **{"ffn_size": 48, "attention": {"kind": request.param}},
        },
        "data": {"train": str(write_shards(tmp_path / "train", 0)), "validation": str(write_shards(tmp_path / "v", 1))},
        "train": {"window_tokens": 32, "batch_lanes": 4, "micro_batch_lanes": 2, "max_steps": 6},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "log": {"every_steps": 1, "memory_every_steps": 2},
        "eval": {"every_steps": 3, "max_tokens": 256},
        "checkpoint": {"every_steps": 3},
    }
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def stored(run: Path) -> dict[tuple[str, str], Tensor]:
    checkpoint = open_checkpoint(resolve(run))
    kinds = ("master", "exp_avg", "exp_avg_sq", "carry")
    wanted = [checkpoint.whole(name, kind) for kind in kinds for name in checkpoint.names(kind)]
    return {(piece.kind, piece.name): values for piece, values in checkpoint.read(wanted)}


def test_it_trains_evaluates_and_generates(run_file: Path, tmp_path: Path, call: Callable[..., int], capsys):
    config = load_run(str(run_file))
    assert call("train", run_file) == 0
    capsys.readouterr()
    names = {name for kind, name in stored(tmp_path / "whole") if kind == "carry"}
    if config.model.attention.kind == "average":
        assert names == {f"layers.{layer}.average" for layer in range(3)}
    else:
        assert {name.split(".")[1] for name in names} == {"0", "2"}, "full attention carries nothing"

    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    figures = {name for row in rows for name in row if name.startswith(("memory/", "gates/"))}
    expected = {"memory/size/layer 2"} if config.model.attention.kind == "average" else {"memory/norm/layer 0"}
    assert expected <= figures and "gates/mean" in figures

    assert call("eval", tmp_path / "whole", "--json") == 0
    assert np.isfinite(json.loads(capsys.readouterr().out)["loss"])
    assert call("generate", tmp_path / "whole", "--prompt", "abc", "--max-new-tokens", "20", "--temperature", "0") == 0
    assert call("checkpoint", "verify", tmp_path / "whole") == 0
    capsys.readouterr()
    kind = config.model.attention.kind
    assert call("export", "hf", tmp_path / "whole", tmp_path / "hf") == 2
    assert capsys.readouterr().err.startswith(f"error: model.attention.kind: {kind} is no attention that the exported")
    assert call("export", "hf", tmp_path / "whole", tmp_path / "hf", "--plain") == 2
    field = "kind: average" if kind == "average" else "conv_tokens: 2"
    assert capsys.readouterr().err.startswith(f"error: model.attention.{field}")


def test_it_is_planned(run_file: Path, call: Callable[..., int], capsys):
    config = load_run(str(run_file))
    assert call("plan", run_file, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == count_parameters(config.model)
    (rank,) = plan["ranks"]
    assert rank["memory"]["activations"] > 0 and plan["prediction"]["step_s"] > 0
    if config.model.attention.kind == "average":
        assert plan["carried_lane_bytes"] == 4 * memory_numbers(config.model)


def test_layers_that_differ_in_their_config_alone_are_planned_apart(run_file: Path):
    costs = rehearsal.find_costs(load_run(str(run_file), ["model.attention={kind: widening}"]), on_cuda=True)
    first, second, third = (sum(layer.forward.attention_flops.values()) for layer in costs.layers)
    assert 0 < first < second == third


def test_one_that_needs_values_is_refused_by_the_plan(run_file: Path, call: Callable[..., int], monkeypatch, capsys):
    forward = AverageAttention.forward

    def peeking(self: AverageAttention, hidden_TBD: Tensor, *rest: Any) -> Any:
        assert hidden_TBD.sum().item() < float("inf")
        return forward(self, hidden_TBD, *rest)

    if load_run(str(run_file)).model.attention.kind == "average":
        monkeypatch.setattr(AverageAttention, "forward", peeking)
        for cached in (rehearsal._extrapolate, rehearsal._rehearse):  # an earlier test may have planned it
            cached.cache_clear()
        assert call("plan", run_file) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: model.attention.kind: average can't be planned: its module needs values")


def test_a_resumed_run_is_the_run(run_file: Path, tmp_path: Path, call: Callable[..., int]):
    """Bit for bit, with the schedule of the same length."""
    stopped = ("--set", f"run_dir={tmp_path / 'stopped'}")
    assert call("train", run_file) == 0
    assert call("train", run_file, *stopped) == 0
    last = resolve(tmp_path / "stopped")
    (last / "index.json").unlink()  # back to step 3
    assert call("train", run_file, *stopped) == 0
    once, resumed = stored(tmp_path / "whole"), stored(tmp_path / "stopped")
    assert once.keys() == resumed.keys()
    assert [key for key, value in once.items() if not torch.equal(value, resumed[key])] == []


def test_reading_in_pieces_is_reading_at_once(run_file: Path, process_groups: None):
    config = load_run(str(run_file)).model
    model = Transformer(config).eval()
    initialise(model, config, 1)
    tokens_BT = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    starts_BT = torch.zeros(2, 40, dtype=torch.bool)
    starts_BT[0, 0] = starts_BT[1, 17] = True
    whole_TBD, _ = model.decode(tokens_BT, model.make_grids(starts_BT, torch.ones(2, 40), None), None)
    state: Any = None
    parts = []
    for piece in (slice(0, 5), slice(5, 6), slice(6, 19), slice(19, 32), slice(32, 40)):
        grids = model.make_grids(starts_BT[:, piece], torch.ones(tokens_BT[:, piece].shape), state)
        part_TBD, state = model.decode(tokens_BT[:, piece], grids, state)
        parts.append(part_TBD)
    torch.testing.assert_close(torch.cat(parts), whole_TBD, rtol=1e-4, atol=1e-5)


def test_its_arithmetic_is_asked_of_each_layer(run_file: Path, process_groups: None):
    config = load_run(str(run_file)).model
    assert count_parameters(config) == sum(parameter.numel() for parameter in Transformer(config).parameters())
    shape = config.shape
    assert memory_numbers(config) == sum(attention.memory_numbers(shape) for attention in config.layers) > 0
    assert forward_flops_per_token(config, 32).attention > 0


def test_a_layer_that_can_not_be_divided_refuses_for_the_stack(run_file: Path):
    config = load_run(str(run_file))
    tree = yaml.safe_load(run_file.read_text())
    if config.model.attention.kind == "turns":
        assert config.model.gate_layers == (0,) and config.model.segment_tokens == 8
        validate({**tree, "parallel": {"context_size": 2}})
        with pytest.raises(ConfigError, match="^parallel.pipeline_size: only some pipeline ranks would hold"):
            validate({**tree, "parallel": {"pipeline_size": 3}})
    else:  # nobody said that its state crosses ranks
        with pytest.raises(ConfigError, match="^parallel.context_size: the state of model.attention.kind average does"):
            validate({**tree, "parallel": {"context_size": 2}})
        validate({**tree, "parallel": {"pipeline_size": 3}})
    with pytest.raises(ConfigError, match=r"^model.attention.kind: unknown value .*infinite"):
        validate({**tree, "model": {**tree["model"], "attention": {"kind": "infinite"}}})


def test_a_state_that_does_not_say_how_it_is_stored_is_refused():
    from infini_train.ops.state import name_leaves

    class Silent(NamedTuple):
        memory_BK: Tensor

    with pytest.raises(AssertionError, match="Silent.memory_BK: declare how it is stored"):
        list(name_leaves(Silent(torch.zeros(1, 1)), "layers.0"))

    class Misspelt(NamedTuple):
        memory_BK: Annotated[Tensor, Stored("memory", "lanes heads")]

    with pytest.raises(AssertionError, match="Misspelt.memory_BK: heads: only kv_heads are divided over ranks"):
        list(name_leaves(Misspelt(torch.zeros(1, 1)), "layers.0"))
    with pytest.raises(AssertionError, match=r"layers.0.average: declared 3 dimensions, and has 2"):
        list(name_leaves(AverageState(torch.zeros(1, 1)), "layers.0"))


def test_a_parameter_without_initial_values_is_refused(process_groups: None):
    config = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, ffn_size=8)
    model = Transformer(config)
    model.layers["0"].attention.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match=r"layers.0.attention.extra: declare its initial values"):
        initialise(model, config, 0)


def test_a_model_opened_for_use_is_of_the_new_kind(run_file: Path, tmp_path: Path, call: Callable[..., int]):
    assert call("train", run_file, "--set", "train.max_steps=3") == 0
    trained = open_trained(tmp_path / "whole")
    assert trained.config.model.attention.kind == load_run(str(run_file)).model.attention.kind


def test_parameters_that_are_counted_wrongly_are_refused(run_file: Path, call: Callable[..., int], monkeypatch):
    """So is one per head that is not divided over tensor-parallel ranks."""
    monkeypatch.setattr(AverageConfig, "extra_parameters", lambda self, shape: 7)
    monkeypatch.setattr(LocalConfig, "extra_parameters", lambda self, shape: 7)
    with pytest.raises(AssertionError, match="the model has .* parameters, and its config counts"):
        call("train", run_file)


def test_a_field_of_one_kind_is_no_reason_for_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AverageConfig, "initial", {"update": "means something else there"})
    assert "model.attention.update" in resumable_fields({"average"})
    assert "model.attention.update" not in resumable_fields({"infini"})
