"""status.json of a run."""

import json
import resource
import time

import pytest

from infini_train.config.errors import ConfigError
from infini_train.train.loop import train


def test_a_finished_run_says_so(configure, monkeypatch):
    monkeypatch.setenv("INFINI_TRAIN_RESTARTS", "3")
    config = configure("train.max_steps=3")
    train(config)
    status = json.loads((config.directory / "status.json").read_text())
    losses = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    assert (status["state"], status["step"], status["total_steps"], status["restarts"]) == ("finished", 3, 3, 3)
    assert status["loss"] == [row["loss/train"] for row in losses if "loss/train" in row][-1]
    assert status["tokens_per_s"] > 0 and status["eta_s"] == 0 and 0 <= time.time() - status["heartbeat"] < 60


def test_a_run_that_fails_says_so(configure):
    config = configure("checkpoint.every_steps=2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # room for all but a checkpoint
    try:
        with pytest.raises(ConfigError, match="file too large"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads((config.directory / "status.json").read_text())["state"] == "failed"
    assert train(config).step == config.train.total_steps
    assert json.loads((config.directory / "status.json").read_text())["state"] == "finished"
