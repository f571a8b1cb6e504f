"""metrics.jsonl and TensorBoard, read back; continued across restarts without overlap."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from infini_train.checkpoint import store
from infini_train.config.files import load_run
from infini_train.logs import console
from infini_train.plots import plot_gate_map
from infini_train.train.checkpointing import save_session
from infini_train.train.loop import train
from infini_train.train.metrics import (
    CHARTS,
    Metrics,
    format_duration,
    step_line,
    summarise_gates,
    trim_metrics,
)
from infini_train.train.opening import open_session
from infini_train.train.session import Session
from infini_train.train.state_figures import gate_matrix


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_board(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    board.Reload()
    return board


def save(session: Session) -> Path:
    """A checkpoint, complete."""
    save_session(session)
    session.saver.wait()
    return store.resolve(session.config.directory)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one short run with validation, shared by the tests that only read."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run_dir(trained, configure, validation, capsys):
    """Six steps with validation, gates and a profile; trained once."""
    config = configure(
        f"run_dir={trained}",
        f"data.validation={validation}",
        "eval.every_steps=3",
        "eval.without_memory=true",
        "log.profile_steps=[2]",
        "optim.min_lr_ratio=0.5",
    )
    if not (trained / "metrics.jsonl").exists():
        with console():
            train(config)
        (trained / "console.txt").write_text(capsys.readouterr().out)
    return trained


def test_numbers_are_in_both_places(run_dir):
    lines, board = read_lines(run_dir), read_board(run_dir)
    tags = {tag for line in lines for tag in line if tag != "step"}
    expected = {"loss/train", "perplexity/train", "bits_per_byte/train", "grad_norm", "tokens"}
    expected |= {"data/corrupt_documents", "skipped_steps"}
    expected |= {"loss/validation", "perplexity/validation", "bits_per_byte/validation", "loss/unigram_entropy"}
    expected |= {"loss/validation_without_memory"}
    expected |= {f"lr/{group}" for group in ("matrices", "vectors", "gates")}
    expected |= {f"speed/{name}" for name in ("step_s", "tokens_per_s", "mfu", "peak_memory_bytes")}
    expected |= {f"seconds/{part}" for part in ("data", "wait", "forward", "backward", "optimizer")}
    expected |= {"gates/mean", "gates/lowest", "gates/highest", "memory/written_tokens"}
    expected |= {"gates/local", "gates/mixed", "gates/memory"}
    expected |= {f"memory/{kind}/layer {layer}" for kind in ("norm", "normaliser") for layer in (0, 1)}
    assert tags == expected == set(board.Tags()["scalars"])
    for tag in expected:
        from_lines = [(line["step"], line[tag]) for line in lines if tag in line]
        from_board = [(event.step, event.value) for event in board.Scalars(tag)]
        assert [step for step, _ in from_lines] == [step for step, _ in from_board], tag
        assert [value for _, value in from_lines] == pytest.approx([value for _, value in from_board], rel=1e-6), tag


def test_values_make_sense(run_dir):
    lines = read_lines(run_dir)
    steps = [line for line in lines if "loss/train" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in steps] == [128 * n for n in range(1, 7)]
    for line in steps:
        assert line["perplexity/train"] == pytest.approx(math.exp(line["loss/train"]))
        parts = sum(line[f"seconds/{part}"] for part in ("data", "wait", "forward", "backward", "optimizer"))
        assert 0 < parts <= line["speed/step_s"] * 1.01
        assert line["speed/tokens_per_s"] == pytest.approx(128 / line["speed/step_s"])
    assert steps[1]["lr/matrices"] == pytest.approx(3e-3) and steps[1]["lr/gates"] == pytest.approx(5e-2)
    assert [line["step"] for line in lines if "loss/validation" in line] == [3, 6]
    assert [line["step"] for line in lines if "gates/mean" in line] == [2, 4, 6]
    first, last = (line for line in lines if "loss/validation" in line)
    assert last["loss/validation"] < first["loss/validation"] < math.log(259) + 0.1


def test_pictures_text_and_layout(run_dir):
    board = read_board(run_dir)
    tags = board.Tags()
    assert [event.step for event in board.Images("gates/by layer and head")] == [2, 4, 6]
    assert board.Images("gates/by layer and head")[0].encoded_image_string.startswith(b"\x89PNG")
    assert [event.step for event in board.Histograms("gates/distribution")] == [2, 4, 6]
    assert board.Histograms("gates/distribution")[0].histogram_value.num == 8  # 2 layers x 4 heads
    (config_text,) = board.Tensors("config/text_summary")
    shown = config_text.tensor_proto.string_val[0].decode()
    assert "segment_tokens: 8" in shown and shown.startswith("```yaml")
    assert "custom_scalars__config__" in tags["tensors"]
    layout = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert {category.title for category in layout.category} == set(CHARTS)
    charts = [chart for category in layout.category for chart in category.chart]
    multiline = {tag for chart in charts for tag in chart.multiline.tag if "*" not in tag}
    margin = {name for chart in charts for s in chart.margin.series for name in (s.value, s.lower, s.upper)}
    assert margin == {"gates/mean", "gates/lowest", "gates/highest"}
    assert multiline | margin <= set(tags["scalars"]), "the layout shows only what is written"


def test_the_profile_is_written(run_dir):
    trace = json.loads((run_dir / "profile" / "step-00000002.json").read_text())
    assert trace["traceEvents"]
    assert "aten::" in (run_dir / "profile" / "step-00000002.txt").read_text()
    assert len(list((run_dir / "profile").iterdir())) == 2


def test_the_console_is_readable(run_dir):
    lines = (run_dir / "console.txt").read_text().splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 6 and steps[0].startswith("step 1/6  loss ")
    assert all(word in steps[0] for word in ("ppl", "bpb", "lr", "|g|", "tok/s", "mfu", "gates", "eta"))
    assert sum(line.startswith("validation at step") for line in lines) == 2
    assert any(line.startswith("saved ") for line in lines)
    assert all(len(line) < 200 for line in lines)


def test_the_saved_config_runs_again(run_dir, configure, validation):
    assert load_run(str(run_dir / "config.yaml")).model == configure().model


def test_steps_do_not_overlap_after_a_resume(configure, tools):
    """The run was killed three steps after its checkpoint: those lines are dropped and written again."""
    config = configure("checkpoint.every_steps=100")
    session = open_session(config)
    tools.drive(session, 3)
    save(session)
    with Metrics(session, 6) as metrics:
        for step in range(1, 7):
            metrics.write(step, {"loss/train": 100.0 + step})
            metrics.write_gates(step, np.full((2, 4), 0.5))
    train(config)
    losses = [(line["step"], line["loss/train"]) for line in read_lines(config.directory) if "loss/train" in line]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in losses[:3]] == [101.0, 102.0, 103.0] and all(loss < 50 for _, loss in losses[3:])
    board = read_board(config.directory)
    assert [event.step for event in board.Scalars("loss/train")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in board.Scalars("loss/train")] == pytest.approx([loss for _, loss in losses])
    steps = [event.step for event in board.Histograms("gates/distribution")]
    assert steps == sorted(set(steps))


def test_trim_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "x": step / 3}) for step in (1, 2, 2, 3, 4)]
    path.write_text("\n".join(whole) + '\n{"step": 2, "x": 0.')
    trim_metrics(path, 3)
    assert path.read_text() == "\n".join(whole[:4]) + "\n"
    path.write_text('[1]\n"text"\n{"x": 1}\n\nnonsense\n' + whole[0] + "\n")
    trim_metrics(path, 3)
    assert path.read_text() == whole[0] + "\n"
    trim_metrics(path, 0)
    assert path.with_suffix(".jsonl.old").read_text() == whole[0] + "\n"
    trim_metrics(tmp_path / "absent.jsonl", 3)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl.old"]


def test_json_knows_no_infinity(configure):
    config = configure()
    session = open_session(config)
    with Metrics(session, 6) as metrics:
        metrics.write(1, {"a": math.nan, "b": math.inf, "c": 2, "d": np.float32(0.5)})
    assert read_lines(config.directory) == [{"step": 1, "a": None, "b": None, "c": 2.0, "d": 0.5}]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0s"), (45.9, "45s"), (60, "1m00s"), (200, "3m20s"), (3600, "1h00m"), (7500, "2h05m")]
)
def test_durations(seconds, shown):
    assert format_duration(seconds) == shown


def test_a_line_without_gates():
    values = {
        "loss/train": 1.23456, "perplexity/train": 3.437, "bits_per_byte/train": 0.5, "lr/matrices": 3e-4,
        "grad_norm": 0.789, "speed/tokens_per_s": 12345.6, "speed/mfu": 0.256,
    }  # fmt: skip
    assert step_line(7, 100, values, 61.0) == (
        "step   7/100  loss 1.2346  ppl 3.44  bpb 0.500  lr 3.00e-04  |g| 0.79  12,346 tok/s  mfu 26%  eta 1m01s"
    )


def test_gates_of_the_one_layer_that_retrieves(configure):
    """The row of a memorizing model is its gated layer, at whichever number it stands."""
    attention = "{kind: memorizing, segment_tokens: 8, cache_tokens: 8, stored_tokens: 32, top_k: 2, gate_init: 1.0}"
    config = configure(f"model.attention={attention}", "model.attention.layer=1")
    session = open_session(config)
    gates_LH = gate_matrix(session.stages, session.engine)
    assert config.model.gate_layers == (1,)
    np.testing.assert_allclose(gates_LH, np.full((1, config.model.num_heads), 1 / (1 + math.exp(-1))), rtol=1e-6)
    axes = plot_gate_map(gates_LH, 3, config.model.gate_layers).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1"]
    with Metrics(session, 6) as metrics:
        metrics.write_gates(1, gates_LH)
    assert read_board(config.directory).Histograms("gates/distribution")[0].histogram_value.num == gates_LH.size


def test_the_shares_of_specialised_heads_are_counted():
    found = summarise_gates(np.array([[0.05, 0.1, 0.5, 0.95], [0.0, 0.9, 0.91, 1.0]]))
    assert found["gates/local"] == 0.25 and found["gates/memory"] == 0.375
    assert found["gates/mixed"] == 1 - 0.25 - 0.375
    assert found["gates/mean"] == pytest.approx(0.55125)


def test_a_line_of_a_window_without_labels():
    values = {"lr/matrices": 3e-4, "speed/tokens_per_s": 100.0, "speed/mfu": 0.2}
    assert step_line(7, 10, values, 2.0) == (
        "step  7/10  read only: no labels here  lr 3.00e-04  100 tok/s  mfu 20%  eta 2s"
    )
