"""BABILong: prompts lie within their length, oracles score as they must, and the command writes, resumes, refuses."""

import json

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.babi import ANSWERS, TASKS
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.eval import retrieval_test
from infini_train.eval.babilong import BabilongGrid, BabilongPrompts, BabilongTest
from infini_train.eval.measurement import run_measurement
from infini_train.eval.retrieval import answer_prompts, summarise_answers
from infini_train.inference.loading import open_trained
from tests.eval.speaker import Speaker

BYTE = ByteTokenizer()
SMALL = ("--lengths", "400", "1K", "--tasks", "qa1", "qa4", "--samples", "2", "--lanes", "4")


def grid_of(**changes) -> BabilongGrid:
    return BabilongGrid(**{"lengths_tokens": (400, 900), "tasks": TASKS, "samples": 3, "max_facts": 20, **changes})


def say_right(prompt, text) -> str:
    """For `Speaker`: the right answer, and more after its sentence."""
    return f" {text.asked.answer}.{' nothing' * 9}"


def say_the_same(prompt, text) -> str:
    """For `Speaker`: always the same answer of a task."""
    return f" {ANSWERS[prompt.task][0]}.{' nothing' * 9}"


def test_an_oracle_is_always_right_and_a_constant_seldom():
    prompts = BabilongPrompts(grid_of(lengths_tokens=(400,), samples=24), BYTE, 16)
    for constant in (False, True):
        answers = [
            a
            for batch in answer_prompts(Speaker(prompts, say_the_same if constant else say_right), prompts, lanes=24)
            for a in batch
        ]
        found = summarise_answers(prompts.grid, answers, 16, "word", ())
        assert found["complete"] and [cell["task"] for cell in found["cells"]] == list(TASKS)
        shares = [cell["exact_match"] for cell in found["cells"]]
        assert all(share < 0.45 for share in shares) if constant else shares == [1.0] * len(TASKS)


@pytest.mark.parametrize("haystack", ["varied", "prose.txt"])
def test_prompts_keep_to_their_length(haystack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prose.txt").write_text("The sea was calm. Nobody spoke! " * 20)
    prompts = BabilongPrompts(grid_of(samples=6, haystack=haystack), BYTE, 16)
    ends = set()
    for length in (400, 900):
        for prompt in prompts.grid.prompts(length):
            text = prompts.write(prompt)
            longest = max(len(f" {word}.") for word in ANSWERS[prompt.task])
            assert text.answer_tokens == longest
            assert length - 16 - longest <= 1 + text.prompt_tokens + longest <= length
            assert 2 <= text.facts <= 20
            ends.add(text.text.question_token % 16)
    assert len(ends) > 8


def test_a_prompt_does_not_depend_on_the_rest_of_the_grid():
    wide = BabilongPrompts(grid_of(), BYTE, 16)
    alone = BabilongPrompts(grid_of(lengths_tokens=(900,), tasks=("qa2",), samples=9), BYTE, 16)
    first, second = (prompts.write(wide.grid.prompt_type(900, "qa2", 1)).text for prompts in (wide, alone))
    np.testing.assert_array_equal(first.read(0, first.tokens), second.read(0, second.tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("qa6",)}, "--tasks: qa6: no such task; choose from qa1, qa2, qa3, qa4, qa5"),
        ({"tasks": ()}, "--tasks: give at least one"),
        ({"tasks": ("qa1", "qa1")}, "--tasks: the same one is given twice"),
        ({"max_facts": 2}, "--max-facts: must be at least 3"),
        ({"lengths_tokens": ()}, "--lengths: give at least one, each positive"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        grid_of(**changes)


def test_everything_is_written(run, call, capsys):
    assert call("eval", "babilong", run, *SMALL) == 0
    said = capsys.readouterr().out
    folder = run / "eval" / "babilong-1-varied"
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and results["all"]["samples"] == 2 * 2 * 2 and results["max_facts"] == 128
    assert [(c["length_tokens"], c["task"]) for c in results["cells"]][:3] == [
        (400, "qa1"),
        (400, "qa4"),
        (1024, "qa1"),
    ]
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 1 + 8
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert "BABILong in varied hay, up to 128 facts, seed 0, 2 samples a cell" in said
    assert "right answers" in said and "words" not in said and "digits" not in said
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert "eval/babilong-varied/right answers by length and task" in board.Tags()["images"]
    assert set(board.Tags()["scalars"]) == {
        f"eval/babilong-varied/exact match/{length}, {task}" for length in ("400", "1K") for task in ("qa1", "qa4")
    }


def test_a_stopped_test_goes_on(run, monkeypatch):
    trained, grid = open_trained(run), grid_of(tasks=("qa1", "qa5"), samples=2)
    batches = retrieval_test.answer_prompts

    def stop_in_the_second(*arguments, **options):
        for number, answers in enumerate(batches(*arguments, **options)):
            if number == 1:
                raise KeyboardInterrupt
            yield answers

    with monkeypatch.context() as patch:
        patch.setattr(retrieval_test, "answer_prompts", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_measurement(BabilongTest(trained, grid, lanes=3), report=lambda line: None)
    said: list[str] = []
    stopped = run_measurement(BabilongTest(trained, grid, lanes=3), report=said.append)
    assert said[0] == "3 of 8 answers were there already"
    whole = run_measurement(BabilongTest(trained, grid, lanes=3), out=run / "whole", report=lambda line: None)
    assert stopped["cells"] == whole["cells"]


def test_mistakes_are_one_line(run, call, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("The sea was calm. " * 9)
    for options, line in (
        (["--tasks", "qa7"], "--tasks: invalid choice: 'qa7'"),
        (["--lengths", "100"], "--lengths: 100 can't hold 3 facts and their question, which take up to"),
        (["--haystack", "none.txt"], "--haystack: none.txt can't be read"),
        (["--max-facts", "2"], "--max-facts: must be at least 3"),
        (["--depths", "0"], "unrecognized arguments: --depths"),
    ):
        assert call("eval", "babilong", run, *options) == 2
        assert line in capsys.readouterr().err
    assert not (run / "eval").exists()
    options = ("--haystack", tmp_path / "short.txt", "--lengths", "400", "--samples", "1")
    assert call("eval", "babilong", run, *options, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["haystack"] == "prose"
    assert "the haystack has 162 tokens; longer prompts meet parts of it again" in captured.err
    (tmp_path / "short.txt").write_text("Another sea. " * 9)
    assert call("eval", "babilong", run, *options) == 2
    assert "holds another test (haystack_sha256:" in capsys.readouterr().err


def test_a_model_is_trained_on_such_texts_and_read(call, tmp_path, capsys):
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"vocab_size": 259, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16},
        "data": {"synthetic": {"kind": "babilong", "tasks": ["qa1", "qa2"], "questions": 3}},
        "train": {"window_tokens": 512, "batch_lanes": 2, "max_steps": 3, "carry_memory": False},
        "optim": {"warmup_steps": 0},
    }
    tree["model"]["attention"] = {"kind": "infini", "segment_tokens": 64, "update": "gated_delta", "read": "token"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert call("train", tmp_path / "tiny.yaml") == 0
    capsys.readouterr()
    assert call("eval", "babilong", tmp_path / "run", "--lengths", "600", "--samples", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 3 and found["complete"] and found["all"]["samples"] == 2
