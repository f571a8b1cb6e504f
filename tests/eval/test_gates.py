"""Gates from a run's metrics to their picture, and what is refused."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_gates_are_drawn_from_the_metrics(run, call, capsys):
    """The run's own row, and two more as training would write them."""
    with (run / "metrics.jsonl").open("a") as stream:
        for step in (2, 3):
            row = {"gates/mean": 0.5, "gates/lowest": 0.02, "gates/highest": 0.97}
            shares = {"gates/local": 0.25, "gates/mixed": 0.5, "gates/memory": 0.25}
            stream.write(json.dumps({"step": step, **row, **shares}) + "\n")
        stream.write('{"step": 4, "gates/me')
    assert call("eval", "gates", run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 3 and found["steps_with_gates"] == 3 and found["gates/local"] == 0.25
    assert (run / "eval" / "gates.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert "eval/gates over training" in board.Tags()["images"]


def test_a_run_without_gates_is_refused(run, call, capsys):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/train": 3.0}\n')
    assert call("eval", "gates", run) == 2
    assert "holds no gates" in capsys.readouterr().err
    assert call("eval", "gates", run / "eval") == 2
    assert "no such file; name the folder of a run" in capsys.readouterr().err
