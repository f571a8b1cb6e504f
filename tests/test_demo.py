"""The demo end to end on a little real text: the project's own sources."""

import json
from pathlib import Path

import pytest

from infini_train.config.errors import ConfigError
from infini_train.demo import run_demo

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.num_layers=2",
    "train.window_tokens=256",
    "train.batch_lanes=2",
    "train.max_steps=3",
    "optim.warmup_steps=1",
    "eval.max_tokens=2000",
]


def test_the_whole_road(tmp_path, capfd):
    out = tmp_path / "a folder with spaces"
    assert run_demo(str(ROOT / "infini_train"), out, SMALL) == 0
    printed = capfd.readouterr().out
    for word in (
        "held-out loss",
        "unigram entropy",
        "gates",
        "checkpoint",
        "tensorboard --logdir",
        "next: infini-train",
    ):
        assert word in printed
    assert (out / "checkpoints" / "step-00000003" / "index.json").is_file()
    assert (out / "data" / "validation" / "manifest.json").is_file()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3
    assert "Traceback" not in printed


def test_a_failing_command_ends_the_demo_with_its_code(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    assert run_demo(str(tmp_path / "empty"), tmp_path / "out", SMALL) == 2
    assert "error: " in capfd.readouterr().err
    assert not (tmp_path / "out" / "data").exists()


def test_a_text_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        run_demo(str(tmp_path / "nothing"), tmp_path / "out", [])
