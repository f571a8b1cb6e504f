"""`train.compile`: what is refused, and a run whose layers are compiled to code for the CPU."""

import json

import pytest
import torch

from infini_train.config.data import DataConfig
from infini_train.config.errors import ConfigError
from infini_train.config.parallel import ParallelConfig
from infini_train.config.run import RunConfig
from infini_train.config.training import TrainConfig
from infini_train.model.transformer import Transformer
from infini_train.parallel import mesh
from infini_train.train import compiling

WINDOW = 32


def configure(tiny, choice: object, **parallel: object) -> RunConfig:
    train = TrainConfig(window_tokens=WINDOW, batch_lanes=2, max_steps=200, compile=choice)
    return RunConfig(
        name="t", model=tiny(), data=DataConfig(train="t"), train=train, parallel=ParallelConfig(**parallel)
    )


@pytest.fixture
def model(process_groups, tiny) -> Transformer:
    return Transformer(tiny())


def is_compiled(model: Transformer) -> bool:
    return all(layer._compiled_call_impl is not None for layer in model.layers.values())


def test_it_is_asked_for(tiny, model) -> None:
    assert configure(tiny, False).train.compile is False and not is_compiled(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "_find_fault", lambda: "")
        compiling.compile_layers([model])
    assert is_compiled(model)


def test_a_compiler_that_does_not_work_is_told_on_every_rank(monkeypatch, tiny, model) -> None:
    def broken(function: object, **_: object) -> object:
        raise RuntimeError("no C compiler\nfound")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"^train.compile: .*RuntimeError: no C compiler found.*set it to false"):
        compiling.compile_layers([model])
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "_find_fault", lambda: "")
    monkeypatch.setattr(mesh, "max_over_world", lambda value: 1.0)
    with pytest.raises(ConfigError, match="on another rank; set it to false"):
        compiling.compile_layers([model])
    assert not is_compiled(model)


def test_weights_that_come_and_go_are_refused(tiny) -> None:
    with pytest.raises(ConfigError, match="^train.compile: with parallel.zero_stage 3 .*set it to false"):
        configure(tiny, True, zero_stage=3)


@pytest.mark.slow
def test_a_compiled_run_trains_as_any_other(tmp_path, train_one_step, call) -> None:
    """Code that inductor made for this CPU: losses of three steps, layers computed again, and of validation."""
    torch._dynamo.utils.counters.clear()
    attention = {"kind": "infini", "segment_tokens": 8, "update": "gated_delta", "read": "token", "conv_tokens": 2}
    losses = {}
    for choice in ("false", "true"):
        home = tmp_path / choice
        home.mkdir()
        run = train_one_step(home, WINDOW, attention=attention)
        fields = ["train.max_steps=3", f"train.compile={choice}", "log.every_steps=1", "eval.max_tokens=64"]
        fields += ["train.activation_checkpointing=layer"]
        settings = [part for field in fields for part in ("--set", field)]
        assert call("train", home / "tiny.yaml", "--set", f"run_dir={home}/more", *settings) == 0
        lines = [json.loads(line) for line in (home / "more" / "metrics.jsonl").read_text().splitlines()]
        losses[choice] = [value for line in lines for key, value in sorted(line.items()) if "loss" in key]
        assert run.is_dir() and len(losses[choice]) >= 3
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] > 0 and not stats["graph_break"], "each layer is one graph"
