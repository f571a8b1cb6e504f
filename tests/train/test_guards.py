"""Steps that nothing is learned from: left out, counted, named; the end of a run that can't go on; spikes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from infini_train.cli import main
from infini_train.config.files import dump
from infini_train.config.run import RunConfig
from infini_train.config.training import GuardConfig
from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.train.building import empty_carried
from infini_train.train.checkpointing import save_session
from infini_train.train.guards import SHOWN, DivergedError, Guard, list_names
from infini_train.train.loop import train
from infini_train.train.opening import open_session
from infini_train.train.session import Session

STEPS = 12
POISON = 200  # a byte that only one document holds


def save(session: Session) -> None:
    save_session(session)
    session.saver.wait()


def poison(session: Session, tokens: slice, value: float = math.nan) -> None:
    """These rows of the embedding get this value, in the weights and in what the weights are made of."""
    name = next(name for name in session.engine.names.values() if name.startswith("embedding"))
    (master,) = (shard for shard in session.engine.shards() if (shard.name, shard.kind) == (name, "master"))
    with torch.no_grad():
        master.values.view(session.config.model.vocab_size, -1)[tokens] = value
        session.stages.transformers()[0].embedding.weight[tokens] = value


@pytest.fixture(scope="module")
def odd_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count up and down, and one of noise, in bytes that no other has."""
    folder = tmp_path_factory.mktemp("odd") / "train"
    with ShardWriter(folder, ByteTokenizer()) as writer:
        for number in range(60):
            tokens = np.arange(50) % 7 if number != 30 else np.random.default_rng(0).integers(150, 250, 50)
            tokens[10] = POISON if number == 30 else tokens[10]
            writer.add(tokens, n_bytes=50, id=f"document {number}")
    return folder


@pytest.fixture
def odd(configure, odd_shards: Path):
    def build(*assignments: str, run: str = "run") -> RunConfig:
        data = (f"data.train={odd_shards}", "data.order_seed=9")  # the odd document comes when all others are known
        settings = (*data, f"train.max_steps={STEPS}", "optim.lr=1e-2", "optim.gate_lr=1e-2")
        return configure(*settings, *assignments, run=run)

    return build


def read_rows(config: RunConfig, name: str) -> list[dict]:
    return [json.loads(line) for line in (config.directory / name).read_text().splitlines()]


def learned_steps(config: RunConfig) -> list[int]:
    return [row["step"] for row in read_rows(config, "metrics.jsonl") if "loss/train" in row]


# -------------------------------------------------------------------------------------- non-finite losses and gradients


def test_a_poisoned_document_is_left_out_counted_and_named(odd, tools):
    config = odd()
    session = open_session(config)
    poison(session, slice(POISON, POISON + 1))
    save(session)
    trained = train(config)
    findings = read_rows(config, "findings.jsonl")
    assert findings and all(row["finding"] == "the loss is nan" for row in findings)
    assert all("document 30" in row["documents"] for row in findings)
    skipped = [row["step"] for row in findings]
    assert learned_steps(config) == [step for step in range(1, STEPS + 1) if step not in skipped]
    assert trained.step == STEPS and trained.engine.optimizer_steps() == STEPS - len(skipped)
    assert trained.guard.skipped == read_rows(config, "status.json")[0]["skipped_steps"] == len(skipped)
    values = tools.capture(trained)
    assert all(value.isfinite().all() for name, value in values.items() if not name.split()[1].startswith("embedding"))


def test_a_run_with_skipped_steps_resumes_exactly(odd, tools):
    config = odd()
    session = open_session(config)
    poison(session, slice(POISON, POISON + 1))
    save(session)
    expected = tools.drive(session, STEPS)
    bad = [number for number, step in enumerate(expected) if math.isnan(step.loss)]
    first = open_session(config)
    found = tools.drive(first, bad[0] + 1)  # the last one is left out
    save(first)
    second = open_session(config)
    assert (second.guard.skipped, second.guard.in_a_row) == (1, 1)
    found += tools.drive(second, STEPS - len(found))
    np.testing.assert_array_equal([step.loss for step in found], [step.loss for step in expected])
    np.testing.assert_array_equal([step.grad_norm for step in found], [step.grad_norm for step in expected])
    assert second.guard.to_json() == session.guard.to_json()
    old = tools.capture(session)
    for name, value in tools.capture(second).items():
        torch.testing.assert_close(value, old[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_too_many_in_a_row_end_the_run_with_one_line(odd, tmp_path, capsys):
    config = odd("guard.max_skips=2", "checkpoint.every_steps=100")
    session = open_session(config)
    poison(session, slice(0, 7))
    save(session)
    (tmp_path / "run.yaml").write_text(dump(config))
    with pytest.raises(SystemExit) as caught:
        main(["train", str(tmp_path / "run.yaml")])
    assert caught.value.code == 4
    said = capsys.readouterr()
    (error,) = (line for line in said.err.splitlines() if line.startswith("error: "))
    assert error == (
        "error: the loss is nan; 3 steps in a row were left out (guard.max_skips: 2); weights contain NaN/Inf:"
        " move the newest checkpoints away and run again"
    )
    assert "rank 0: not finite: embedding" in said.err
    assert [row["step"] for row in read_rows(config, "findings.jsonl")] == [1, 2, 3]
    assert [path.name for path in (config.directory / "checkpoints").glob("step-*")] == ["step-00000000"]


def run_ranks(config: RunConfig, folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Goes on from the run's checkpoint in two processes."""
    (folder / "run.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "infini_train.cli", "train", str(folder / "run.yaml"), "--nproc=2"]
    return subprocess.run([*command, *(f"--set={each}" for each in settings)], capture_output=True, text=True)


@pytest.mark.slow
def test_all_ranks_leave_the_same_steps_out(odd, tmp_path):
    """Though only one of them reads the document."""
    findings = []
    for settings in ([], ["parallel.zero_stage=3"]):
        config = odd(run=f"run{len(settings)}")
        session = open_session(config)
        poison(session, slice(POISON, POISON + 1))
        save(session)
        if settings:
            done = run_ranks(config, tmp_path, *settings)
            assert done.returncode == 0, done.stderr
            assert "OVERFLOW" not in done.stdout + done.stderr, "DeepSpeed has nothing to add"
        else:
            train(config)
        findings.append([(row["step"], row["documents"]) for row in read_rows(config, "findings.jsonl")])
    assert findings[0] == findings[1] and findings[0]


@pytest.mark.slow
def test_all_ranks_hear_of_gradients_that_are_no_numbers(odd, tmp_path):
    """All embeddings at 0 under a tiny norm_eps: the loss is ln V, and gradients overflow, least in the last stage."""
    config = odd("model.norm_eps=1e-38", "model.num_layers=6", "guard.max_skips=1")
    session = open_session(config)
    poison(session, slice(0, 259), 0.0)
    save(session)
    done = run_ranks(config, tmp_path, "parallel.pipeline_size=2")
    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr  # its own, or that of a rank that received the report
    assert "the gradients are not finite; 2 steps in a row were left out" in last, done.stderr
    assert "; all weights are finite: " in last


# --------------------------------------------------------------------------------------------------------------- spikes

SPIKES = ("guard.spike_window_steps=3", "guard.spike_deviations=0.7")


def test_a_spike_is_only_told_by_default(odd):
    config = odd(*SPIKES, run="warned")
    train(config)
    quiet = odd(*SPIKES, "guard.spikes=ignore", run="quiet")
    train(quiet)
    (finding, *_) = read_rows(config, "findings.jsonl")
    assert "document 30" in finding["documents"] and finding["finding"].startswith("the loss jumped to ")
    assert any(row["step"] == finding["step"] for row in read_rows(config, "metrics.jsonl"))
    numbers = [
        [(row["loss/train"], row["grad_norm"]) for row in read_rows(each, "metrics.jsonl") if "loss/train" in row]
        for each in (config, quiet)
    ]
    assert numbers[0] == numbers[1] and not (quiet.directory / "findings.jsonl").exists()


def test_a_spike_can_be_left_out(odd):
    config = odd(*SPIKES, "guard.spikes=skip")
    trained = train(config)
    (finding, *_) = findings = read_rows(config, "findings.jsonl")
    assert "document 30" in finding["documents"]
    assert not {row["step"] for row in findings} & set(learned_steps(config))
    assert trained.guard.skipped == len(findings)


def test_a_spike_can_send_the_run_back(odd, tools, lines):
    """Weights and step of the checkpoint, the text after the spike, empty memories: done by hand it is the same."""
    config = odd(*SPIKES, "guard.spikes=rollback")
    train(config)
    (finding,) = read_rows(config, "findings.jsonl")
    back = finding["step"] - 1 - (finding["step"] - 1) % 3
    assert any(line.startswith("rolled back to ") and f"(step {back})" in line for line in lines)
    rows = [row for row in read_rows(config, "metrics.jsonl") if "loss/train" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step once"

    session = open_session(odd(run="by hand"))
    expected = tools.drive(session, back)
    for _ in range(finding["step"] - back):
        _, session.lanes = session.reader.next(session.lanes)
    session.carried = empty_carried(session.config, session.stages)
    expected += tools.drive(session, STEPS - back)
    assert [(row["loss/train"], row["grad_norm"]) for row in rows] == [(step.loss, step.grad_norm) for step in expected]


def test_rollbacks_that_do_not_help_end_the_run(odd):
    settings = ("guard.spikes=rollback", "guard.spike_window_steps=2", "guard.max_skips=1", "checkpoint.every_steps=3")
    config = odd(*settings, "guard.spike_deviations=1e-9", "optim.lr=1e-12", "optim.gate_lr=1e-12")
    with pytest.raises(DivergedError, match="2 rollbacks to the same checkpoint did not help"):
        train(config)


def test_a_spike_lies_far_above_the_last_losses():
    guard = Guard(GuardConfig(spikes="skip", spike_window_steps=4, spike_deviations=3))
    for loss in (2.0, 2.2, 1.8):
        guard.record(loss, "")
    assert guard.find_problem(100.0) == "", "too few losses to judge by"
    guard.record(2.0, "")
    assert guard.find_problem(2.4) == "" and guard.find_problem(0.1) == ""
    assert guard.find_problem(2.5).startswith("the loss jumped to 2.5000; the last 4 had a mean of 2.0000")
    guard.record(2.5, "a spike")
    assert guard.find_problem(2.5), "what was left out does not count"
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    other = Guard(guard.config)
    other.restore(json.loads(json.dumps(guard.to_json())))
    assert other.to_json() == guard.to_json() and other.find_problem(2.5) == guard.find_problem(2.5)


def test_a_loss_that_stands_still_may_breathe():
    guard = Guard(GuardConfig(spikes="skip", spike_window_steps=3, spike_deviations=5))
    for _ in range(3):
        guard.record(2.0, "")
    assert guard.find_problem(2.09) == "" and guard.find_problem(2.11)


def test_long_lists_are_cut():
    assert list_names(["a", "b"]) == "a, b"
    assert list_names(str(number) for number in range(SHOWN + 2)).endswith(f"{SHOWN - 1} and 2 more")
