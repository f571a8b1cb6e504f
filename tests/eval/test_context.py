"""Context from the command line to its files: what is written, that it goes on, and what is refused."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.eval import context
from infini_train.eval.context import ContextTest
from infini_train.eval.context_losses import ContextPlan
from infini_train.eval.measurement import run_measurement
from infini_train.inference.loading import open_trained

PLAN = ContextPlan(contexts_tokens=(16, 48), targets=2, target_tokens=8)
OPTIONS = ("--contexts", "16", "48", "--targets", "2", "--target-tokens", "8")


@pytest.fixture
def books(tools, tmp_path):
    """Documents that end at a segment's edge, so that each begins a segment whether they are read apart or in a row."""
    tools.write(tmp_path / "books", [127, 15, 63, 303])
    return tmp_path / "books"


def test_everything_is_written(run, books, call, capsys):
    assert call("eval", "context", run, "--data", books, *OPTIONS) == 0
    said = capsys.readouterr().out
    folder = run / "eval" / "context-1"
    results = json.loads((folder / "results.json").read_text())
    assert results["documents"] == 4 and results["documents_with_targets"] == 3
    assert results["whole"]["tokens"] == sum((128, 16, 64, 304)) == sum(r["tokens"] for r in results["positions"])
    assert [row["first_position"] for row in results["positions"]] == [0, 64, 128, 256]
    assert [row["documents"] for row in results["positions"]] == [4, 2, 1, 1]
    assert [row["context_tokens"] for row in results["contexts"]] == [16, 48, None]
    assert all(row["tokens"] == 3 * 2 * 8 for row in results["contexts"])
    assert results["contexts"][-1]["above_all"] == 0
    for row in results["positions"] + results["contexts"]:
        assert row["loss_95"][0] <= row["loss"] <= row["loss_95"][1] and row["perplexity"] == np.exp(row["loss"])
    assert "document 1" in said and "too short for the largest context" in said and "256 to 511" in said
    assert (folder / "context.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert "eval/context/by position and by context" in board.Tags()["images"]
    assert board.Scalars("eval/context/loss by context/all")[0].value == pytest.approx(results["contexts"][-1]["loss"])


def test_the_mean_over_positions_is_the_perplexity(run, books, call, capsys):
    assert call("eval", "perplexity", run, "--data", books, "--stream", "--json") == 0
    expected = json.loads(capsys.readouterr().out)
    found = run_measurement(ContextTest(open_trained(run), PLAN, data=str(books)), report=lambda line: None)
    assert found["whole"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["whole"]["tokens"] == expected["tokens"]


def test_a_stopped_measurement_goes_on(run, books, monkeypatch):
    """Stopped inside the third document: the two before it are kept, and the end is that of one never stopped."""
    trained, measure = open_trained(run), context.measure_document

    def stop_in_the_third(model, dataset, document, *arguments, **options):
        if document == 2:
            raise KeyboardInterrupt
        return measure(model, dataset, document, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(context, "measure_document", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_measurement(ContextTest(trained, PLAN, data=str(books)), report=lambda line: None)
    said: list[str] = []
    stopped = run_measurement(ContextTest(trained, PLAN, data=str(books)), report=said.append)
    assert said[0] == "2 of 4 documents were there already" and len(said) == 3
    whole = run_measurement(ContextTest(trained, PLAN, data=str(books)), out=run / "whole", report=lambda line: None)
    assert stopped["positions"] == whole["positions"] and stopped["contexts"] == whole["contexts"]


def test_what_does_not_fit_is_refused(run, books, call, capsys):
    assert call("eval", "context", run, "--data", books, "--contexts", "1K") == 2
    assert "--contexts: 1024: the longest document has 303 tokens; use at most 240" in capsys.readouterr().err
    assert call("eval", "context", run, "--data", books, "--contexts", "many") == 2
    assert "--contexts: many is no length" in capsys.readouterr().err
    assert call("eval", "context", run, "--data", books, *OPTIONS, "--documents", "1") == 0
    assert call("eval", "context", run, "--data", books, *OPTIONS, "--seed", "1") == 2
    assert "holds another test (seed: 0, not 1)" in capsys.readouterr().err
    assert not (run / "eval" / "context-1" / "results.json.partial").exists()
