"""A passkey test from the command line to its files: what is written, that it goes on, and what is refused."""

import json
import re

import pytest
import sentencepiece
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import SentencePieceTokenizer
from infini_train.eval import retrieval_test
from infini_train.eval.measurement import run_measurement
from infini_train.eval.passkey import PasskeyAnswer, PasskeyGrid, PasskeyTest
from infini_train.eval.records import RecordFile
from infini_train.inference.loading import open_trained

SMALL = ("--lengths", "260", "300", "--depths", "3", "--samples", "2", "--lanes", "6")


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_table_lines_picture_and_scalars(run, capsys, call):
    capsys.readouterr()
    assert call("eval", "passkey", run, *SMALL) == 0
    said = capsys.readouterr().out
    assert said.count(" exact 0/2 = 0 (0-65.8)") == 6, "each cell when it is done"
    assert re.search(r"^exact match +260 +300$", said, flags=re.MULTILINE) and "all: exact 0/12, 0 (0-24.2)" in said
    folder = run / "eval" / "passkey-1"
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "heatmap.png", "results.json"]
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and results["step"] == 1 and len(results["cells"]) == 6
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert board.Tags()["images"] == ["eval/passkey/exact match by length and position"]
    assert {tag for tag in board.Tags()["scalars"] if "match" in tag} == {
        f"eval/passkey/exact match/{length} at {position}" for length in (260, 300) for position in ("0", "0.5", "1")
    }
    assert board.Scalars("eval/passkey/digits/300 at 1")[0].step == 1


def test_json_is_one_line_and_other_tests_have_other_folders(run, capsys, call):
    capsys.readouterr()
    assert call("eval", "passkey", run, *SMALL, "--samples", 1, "--wording", "harbour", "--seed", 3, "--json") == 0
    said = capsys.readouterr()
    results = json.loads(said.out)
    assert said.out.count("\n") == 1 and " exact 0/1 " in said.err
    assert results["folder"] == str(run / "eval" / "passkey-1-harbour-seed3") and results["all"]["samples"] == 6
    assert call("eval", "passkey", run, *SMALL, "--samples", 1, "--out", run / "mine", "--json") == 0
    assert {path.name for path in (run / "mine").iterdir()} == {
        "answers.jsonl",
        "heatmap.png",
        "results.json",
        "tensorboard",
    }


def test_more_samples_and_lengths_add_to_what_is_there(run, capsys, call):
    assert call("eval", "passkey", run, *SMALL) == 0
    file = run / "eval" / "passkey-1" / "answers.jsonl"
    before = file.read_text()
    more = ("--lengths", 300, 280, "--depths", 0, 1, "--samples", 3)
    assert call("eval", "passkey", run, *more) == 0
    assert "4 of 12 answers were there already" in capsys.readouterr().out
    after = file.read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 8
    assert call("eval", "passkey", run, *more, "--out", run / "fresh") == 0
    answers = [RecordFile(path, PasskeyAnswer, {}).records for path in (file, run / "fresh" / "answers.jsonl")]
    first, fresh = ({a.prompt: (a.key, a.said, a.key_token) for a in found} for found in answers)
    assert fresh.items() <= first.items() and len(fresh) == 12


def test_depths_by_their_old_name(run, capsys, call):
    options = ("--lengths", "260", "--samples", "1", "--json")
    found = []
    for name in ("--depths", "--positions"):
        capsys.readouterr()
        assert call("eval", "passkey", run, *options, name, "0.5", "--out", run / name) == 0
        shown = capsys.readouterr()
        found.append(json.loads(shown.out)["cells"])
        assert ("note: --positions is now called --depths\n" in shown.err) == (name == "--positions")
    assert found[0] == found[1] and found[0][0]["position"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--wording", "papr"], "--wording: papr: no such wording; choose one of paper, "),
        (["--lengths", "32KB"], "--lengths: 32KB is no length"),
        (["--lengths", "100"], "--lengths: 100 tokens can't hold the prompt; wording paper with 5 digits takes 250 "),
        (
            ["--lengths", "260", "--digits", "10"],
            "--lengths: 260 tokens can't hold the prompt; wording paper with ",
        ),
        (["--depths", "0.5", "2"], "--depths: give at least one, each between 0 (start) and 1 (end)"),
        (["--samples", "0"], "--samples: must be positive"),
        (["--out", __file__], f"--out: {__file__} is a file; name a folder"),
    ],
)
def test_mistakes_get_one_line(arguments, line, run, capsys, call):
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    assert call("eval", "passkey", run, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_a_run_without_a_checkpoint(tmp_path, capsys, call):
    assert call("eval", "passkey", tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: holds no checkpoint")


def test_a_tokenizer_that_joins_digits(run, tmp_path):
    """Refused before anything is written."""
    with (tmp_path / "t.model").open("wb") as file:
        text = "The pass key is 12345 67 890 12 34 56 78 90 123 what was read? " * 20
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text]), model_writer=file, vocab_size=80, hard_vocab_limit=False, minloglevel=2
        )
    trained = open_trained(run)._replace(tokenizer=SentencePieceTokenizer(tmp_path / "t.model"))
    grid = PasskeyGrid(lengths_tokens=(400,), depths=(0.5,), samples=1)
    with pytest.raises(ConfigError, match=r"^tokenizer: doesn't write each digit as a token of its own"):
        run_measurement(PasskeyTest(trained, grid, lanes=1))
    assert not (run / "eval").exists()


# --------------------------------------------------------------------------------------------------------- interrupted


def test_a_stopped_test_goes_on(run, monkeypatch):
    """Stopped while a batch is read: the batches before it are kept, and the end is that of a test never stopped."""
    trained, grid = open_trained(run), PasskeyGrid(lengths_tokens=(260, 400), depths=(0.0, 1.0), samples=3)
    batches = retrieval_test.answer_prompts

    def stop_in_the_third(*arguments, **options):
        for number, answers in enumerate(batches(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield answers

    with monkeypatch.context() as patch:
        patch.setattr(retrieval_test, "answer_prompts", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_measurement(PasskeyTest(trained, grid, lanes=2), report=lambda line: None)
    folder = run / "eval" / "passkey-1"
    assert [path.name for path in folder.iterdir()] == ["answers.jsonl"]
    said: list[str] = []
    stopped = run_measurement(PasskeyTest(trained, grid, lanes=2), report=said.append)
    assert said[0] == "4 of 12 answers were there already"
    whole = run_measurement(PasskeyTest(trained, grid, lanes=2), out=run / "whole", report=lambda line: None)
    assert stopped["cells"] == whole["cells"] and stopped["key_phases"] == whole["key_phases"]
