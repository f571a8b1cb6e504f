"""A run that stopped and went on is the run that never stopped: bit for bit, in fp32 on one process."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from infini_train.checkpoint import store
from infini_train.checkpoint.fragments import CheckpointError
from infini_train.checkpoint.index import dump_index, parse_index
from infini_train.config.errors import ConfigError
from infini_train.data.sealed import dump_sealed
from infini_train.data.source import open_source
from infini_train.resilience.signals import Stopped
from infini_train.train.checkpointing import save_session
from infini_train.train.loop import train
from infini_train.train.opening import open_session
from infini_train.train.session import Session

STEPS, STOP = 6, 3
VARIED = ("train.segment_tokens=[4, 8, 16]", "train.local_dropout=0.9", "train.local_dropout_steps=6")


def save(session: Session) -> Path:
    """A checkpoint, complete."""
    save_session(session)
    session.saver.wait()
    return store.resolve(session.config.directory)


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def same_batch(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize(
    ("attention", "precision", "more"),
    [
        ("linear", "fp32", ()),
        ("delta", "fp32", ()),
        ("local", "fp32", ()),
        ("full", "fp32", ()),
        ("delta", "bf16", ()),
        ("delta", "fp32", VARIED),
    ],
    ids=["linear", "delta", "local", "full", "delta-bf16", "delta-varied"],
)
def test_resuming_is_exact(attention, precision, more, configure, tools):
    settings = (f"model.attention={tools.attention[attention]}", f"train.precision={precision}", *more)
    whole = open_session(configure(*settings, run="whole"))
    expected = tools.drive(whole, STEPS)
    assert any(step.batch.starts_BT[:, 1:].any() for step in expected[STOP:]), "documents must begin inside windows"

    config = configure(*settings, run="parts")
    first = open_session(config)
    found = tools.drive(first, STOP)
    save(first)
    del first
    second = open_session(config)
    assert second.step == STOP
    found += tools.drive(second, STEPS - STOP)

    assert [(step.loss, step.grad_norm) for step in found] == [(step.loss, step.grad_norm) for step in expected]
    assert all(same_batch(a.batch, b.batch) for a, b in zip(found, expected, strict=True))
    tools.assert_same(tools.capture(second), tools.capture(whole))
    assert (second.lanes, second.step, second.tokens) == (whole.lanes, whole.step, whole.tokens)
    assert second.engine.optimizer_steps() == whole.engine.optimizer_steps() == STEPS
    assert second.tokens == STEPS * 32 * 4


def test_a_run_stopped_by_a_signal_goes_on_exactly(configure, tools, lines):
    attention = f"model.attention={tools.attention['delta']}"
    whole = train(configure(attention, run="whole"))
    config = configure(attention, run="parts")
    metrics = config.directory / "metrics.jsonl"

    def stop_after_a_step() -> None:
        for _ in range(3000):
            if metrics.exists() and metrics.read_text():
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    thread = threading.Thread(target=stop_after_a_step)
    thread.start()
    with pytest.raises(Stopped, match="SIGTERM"):  # or it came too late to test anything
        train(config)
    thread.join()
    (stopped_at,) = [int(line.split()[5]) for line in lines if line.startswith("stopped by SIGTERM at step")]
    assert stopped_at < STEPS

    second = train(config)
    assert any("resumed from" in line and f"(step {stopped_at})" in line for line in lines)
    tools.assert_same(tools.capture(second), tools.capture(whole))

    def losses(path: Path) -> list[tuple]:
        read = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss/train"], line["grad_norm"]) for line in read if "loss/train" in line]

    assert [step for step, *_ in losses(config.directory)] == list(range(1, STEPS + 1))
    assert losses(config.directory) == losses(whole.config.directory)


def test_generators_go_on(configure):
    config = configure()
    session = open_session(config)
    save(session)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(99)
    np.random.seed(99)
    open_session(config)
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])


@pytest.mark.parametrize("lanes", [1, 4])
def test_resume_with_other_micro_batches(lanes, configure, tools, lines):
    config = configure(f"model.attention={tools.attention['delta']}")
    session = open_session(config)
    tools.drive(session, STOP)
    save(session)
    expected = tools.drive(session, STEPS - STOP)
    lines.clear()
    changed = configure(f"model.attention={tools.attention['delta']}", f"train.micro_batch_lanes={lanes}")
    other = open_session(changed)
    assert any("train.micro_batch_lanes: 2 -> " + str(lanes) in line for line in lines)
    found = tools.drive(other, STEPS - STOP)
    assert [step.loss for step in found] == pytest.approx([step.loss for step in expected], rel=1e-5)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in expected], rel=1e-3)
    before, after = tools.capture(session), tools.capture(other)
    for name, value in before.items():
        if name.startswith("weight"):
            torch.testing.assert_close(after[name], value, atol=2e-4, rtol=0)


def test_a_corrupt_newest_checkpoint_is_named_and_the_previous_used(configure, tools, lines):
    config = configure()
    session = open_session(config)
    tools.drive(session, 2)
    save(session)
    expected = tools.drive(session, 2)
    newest = save(session)
    file = newest / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)

    lines.clear()
    again = open_session(config)
    assert again.step == 2
    problem = next(line for line in lines if "corrupt" in line)
    assert problem.startswith("warning: ") and problem.endswith("; step-00000002 is used instead")
    assert "step-00000004" in problem and file.name in problem
    assert (newest.parent / "damaged-step-00000004").is_dir() and not newest.exists()
    assert (newest.parent / "latest").read_text() == "step-00000002\n"
    assert [step.loss for step in tools.drive(again, 2)] == [step.loss for step in expected]
    save(again)
    assert open_session(config).step == 4, "the damaged one is not in the way"


def test_no_valid_checkpoint_is_an_error_not_a_new_run(configure):
    config = configure()
    folder = save(open_session(config))
    (folder / "index.json").write_text("{")
    with pytest.raises(ConfigError, match="no valid checkpoint.*index.json"):
        open_session(config)


def test_init_from_takes_weights_only(configure, tools, lines):
    origin = open_session(configure(run="origin"))
    tools.drive(origin, 3)
    folder = save(origin)
    lines.clear()
    new = open_session(configure(f"train.init_from={folder.parent.parent}", "optim.lr=1e-4", run="new"))
    assert any(str(folder) in line and "weights" in line for line in lines)
    old, values = tools.capture(origin), tools.capture(new)
    for name, value in values.items():
        kind = name.split()[0]
        expected = old[name] if kind in ("weight", "master") else torch.zeros_like(value)
        if name.endswith("document_BR"):
            continue  # no document was read yet: checked by the position below
        assert torch.equal(value, expected), name
    fresh = open_session(configure(run="fresh"))
    assert (new.step, new.tokens, new.lanes) == (0, 0, fresh.lanes)
    assert new.engine.optimizer_steps() == 0
    save(new)
    resumed = open_session(configure("train.init_from=nowhere", "optim.lr=1e-4", run="new"))
    tools.assert_same(tools.capture(resumed), values)


@pytest.mark.parametrize(("old", "new"), [("full", "linear"), ("linear", "local"), ("local", "delta")])
def test_init_from_another_kind_of_attention(old, new, configure, tools, lines):
    """Shared weights are taken, new gates begin at gate_init, and the run goes on and resumes."""
    origin = open_session(configure(f"model.attention={tools.attention[old]}", run="origin"))
    tools.drive(origin, 2)
    folder = save(origin)
    settings = (f"train.init_from={folder}", f"model.attention={tools.attention[new]}")
    if new != "local":
        settings += ("model.attention.gate_init=-3.0",)
    config = configure(*settings, run="new")
    lines.clear()
    session = open_session(config)
    assert any("model.attention.kind: " in line for line in lines)
    there, here = dict(origin.stages.named_globally()), dict(session.stages.named_globally())
    for name, parameter in here.items():
        if name in there:
            assert torch.equal(parameter, there[name]), name
        else:
            first = 0.0 if name.endswith(".conv") else -3.0
            assert name.endswith((".gate", ".conv")) and torch.equal(parameter, torch.full_like(parameter, first))
    assert any(name.endswith(".gate") for name in here) == (new != "local")
    tools.drive(session, 1)
    save(session)
    resumed = open_session(config)
    tools.assert_same(tools.capture(resumed), tools.capture(session))


def test_init_from_without_a_convolution_begins_one_that_changes_nothing(configure, tools):
    """From another seed's weights; a convolution that the other model has can't be left out."""
    plain = tools.attention["linear"]
    near = plain.replace("}", ", conv_tokens: 2}")
    origin = open_session(configure(f"model.attention={plain}", run="origin"))
    tools.drive(origin, 1)
    settings = f"train.init_from={save(origin)}", f"model.attention={near}"
    session = open_session(configure(*settings, run="new"))
    there, here = dict(origin.stages.named_globally()), dict(session.stages.named_globally())
    assert all(torch.equal(here[name], parameter) for name, parameter in there.items())
    new = {name: parameter for name, parameter in here.items() if name not in there}
    assert new and all(name.endswith(".conv") and not parameter.any() for name, parameter in new.items())
    tools.drive(session, 1)
    back = f"train.init_from={save(session)}"
    spread = open_session(configure(*settings, "model.attention.conv_std=0.5", run="spread"))
    assert all(dict(spread.stages.named_globally())[name].std() > 0.1 for name in new)
    for other in (plain, near.replace("conv_tokens: 2", "conv_tokens: 3"), tools.attention["local"]):
        with pytest.raises(ConfigError, match="is of another model: model.attention.conv_tokens is 2 there and"):
            open_session(configure(back, f"model.attention={other}", run="back"))


def test_gates_of_another_kind_are_not_taken(configure):
    """They mix in another memory, such as retrieved keys."""
    kind = "{kind: memorizing, segment_tokens: 8, cache_tokens: 8, stored_tokens: 32, top_k: 2, gate_init: 2.0}"
    origin = open_session(configure(f"model.attention={kind}", run="origin"))
    assert any(name.endswith(".gate") for name, _ in origin.stages.named_globally())
    settings = f"train.init_from={save(origin)}", "model.attention.gate_init=-3.0"
    session = open_session(configure(*settings, run="new"))
    gates = [parameter for name, parameter in session.stages.named_globally() if name.endswith(".gate")]
    assert len(gates) == session.config.model.num_layers
    assert all(torch.equal(gate, torch.full_like(gate, -3.0)) for gate in gates)


def test_a_checkpoint_that_lacks_a_gate_of_its_own_kind_is_refused(configure):
    folder = save(open_session(configure(run="origin")))
    index = parse_index((folder / "index.json").read_text())
    kept = tuple(entry for entry in index.fragments if entry.name != "layers.0.attention.gate")
    (folder / "index.json").write_text(dump_index(dataclasses.replace(index, fragments=kept)))
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.gate \(master\): is not in the checkpoint"):
        open_session(configure(f"train.init_from={folder}", run="new"))


def test_init_from_another_model_is_refused(configure):
    folder = save(open_session(configure(run="origin")))
    config = configure(f"train.init_from={folder}", "model.ffn_size=64", run="new")
    with pytest.raises(ConfigError, match=r"train\.init_from: .*model\.ffn_size is 48 there and 64 here"):
        open_session(config)
    assert not config.directory.exists()


@pytest.mark.parametrize(
    ("assignment", "field"),
    [
        ("seed=1", "seed"),
        ("optim.lr=1e-3", "optim.lr"),
        ("train.window_tokens=64", "train.window_tokens"),
        ("train.batch_lanes=8", "train.batch_lanes"),
        ("train.precision=bf16", "train.precision"),
        ("model.attention.update=delta", "model.attention.update"),
        ("model.num_layers=3", "model.num_layers"),
    ],
)
def test_a_field_that_may_not_change_is_refused_by_name(assignment, field, configure):
    save(open_session(configure()))
    config = configure(assignment)
    before = listing(config.directory)
    with pytest.raises(ConfigError, match=rf"^{field}: .*resumed run can't change it"):
        open_session(config)
    assert listing(config.directory) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("lanes", None), ("lanes", "nonsense"), ("rng", None), ("rng", {}), ("data", None), ("step", None)],
)
def test_a_state_that_another_program_wrote_is_refused_in_one_line(key, value, configure):
    config = configure()
    folder = save(open_session(config))
    index = parse_index((folder / "index.json").read_text())
    index.state.pop(key)
    if value is not None:
        index.state[key] = value
    (folder / "index.json").write_text(dump_index(index))
    with pytest.raises(CheckpointError, match=rf"^{folder}: its state can't be read \([^\n]*\); use another one$"):
        open_session(config)


def test_other_training_data_are_refused(configure, tools, tmp_path):
    save(open_session(configure()))
    other = tools.write_shards(tmp_path / "other", (50, 60), seed=5)
    with pytest.raises(ConfigError, match=r"^data\.train: .*is not the data"):
        open_session(configure(f"data.train={other}"))


def test_a_checkpoint_of_an_earlier_version_goes_on_with_the_same_data(configure):
    """It knew tokenizer and shards alone."""
    session = open_session(configure())
    (earlier,) = session.source.earlier_identities
    assert earlier != session.source.identity
    session.source = dataclasses.replace(session.source, identity=earlier)
    save(session)
    assert open_session(configure()).source.identity == open_source(configure()).identity


def test_training_refuses_special_ids_that_are_not_the_tokenizers(configure, tmp_path):
    """A new run, one that goes on, and one whose checkpoint is of an earlier version."""
    shutil.copytree(configure().data.train, tmp_path / "copy")
    changed = f"data.train={tmp_path / 'copy'}"
    session = open_session(configure(changed))
    path = tmp_path / "copy" / "manifest.json"
    sealed = path.read_bytes()
    path.write_bytes(dump_sealed({**json.loads(sealed), "eos_id": 3}))
    with pytest.raises(ConfigError, match=r"eos_id is 3 in manifest.json and 257 in the tokenizer"):
        train(configure(changed))
    session.source = dataclasses.replace(session.source, identity=session.source.earlier_identities[0])
    path.write_bytes(sealed)
    save(session)
    path.write_bytes(dump_sealed({**json.loads(sealed), "eos_id": 3}))
    with pytest.raises(
        ConfigError, match=r"^data\.train: .* has the ids \(256, 3, 258\) for bos, eos and pad, and the"
    ):
        open_session(configure(changed))
    path.write_bytes(sealed.replace(b'"eos_id": 257', b'"eos_id": 256'))
    with pytest.raises(ConfigError, match=r"^data\.train: .*manifest.json: is not as it was written"):
        open_session(configure(changed))


def test_a_longer_run_goes_on(configure, tools, lines):
    session = open_session(configure("train.max_steps=3"))
    tools.drive(session, 3)
    save(session)
    lines.clear()
    longer = train(configure("train.max_steps=5"))
    assert longer.step == 5 and any("train.max_steps: 3 -> 5" in line for line in lines)
    again = train(configure("train.max_steps=5"))
    assert again.step == 5 and any("has done all of its 5 steps" in line for line in lines)
