"""RULER: oracles score 100 and 0 in every task, a real model runs, everything is written, resumed or refused."""

import json
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.ruler.questions import read_questions
from infini_train.data.synthetic.ruler.tasks import QUESTION_TASKS, TASKS
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.eval import retrieval_test
from infini_train.eval.measurement import run_measurement
from infini_train.eval.retrieval import answer_prompts, score_cells
from infini_train.eval.ruler import RulerGrid, RulerPrompts, RulerTest, choose_tasks
from infini_train.inference.loading import open_trained
from tests.eval.speaker import Speaker

BYTE = ByteTokenizer()


@pytest.fixture
def qa(tmp_path):
    """A file of four questions."""
    lines = [
        {"question": f"Who has {i}?", "answers": [f"Anna {i}", f"Mrs {i}"], "context": [f"Anna {i} has {i}."]}
        for i in range(4)
    ]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "qa.jsonl"


def grid_of(*tasks: str, qa=None, **changes) -> RulerGrid:
    questions = {} if qa is None else dict.fromkeys(QUESTION_TASKS, read_questions(qa))
    return RulerGrid(**{"tasks": tasks, "lengths_tokens": (2500,), "samples": 2, "questions": questions, **changes})


def listed(text) -> str:
    """A right answer in the form that the prompt asks for, within the tokens that may be written."""
    return f" {', '.join(text.references)}"


@pytest.mark.parametrize(
    ("speak", "expected"),
    [
        (listed, 100),
        (lambda text: listed(text).upper(), 100),  # whatever the case
        (lambda text: f" {text.references[-1]}", None),  # one of them: all for questions, else its share
        (lambda text: " the answer is 42", 0),
        (lambda text: "", 0),
    ],
)
def test_every_task_scores_as_published(qa, speak, expected):
    prompts = RulerPrompts(grid_of(*TASKS, qa=qa), BYTE, 16)
    answers = [
        a
        for batch in answer_prompts(Speaker(prompts, lambda prompt, text: speak(text)), prompts, lanes=3)
        for a in batch
    ]
    scores = {cell[1]: 100 * score.score for cell, score in score_cells(prompts.grid, answers).items()}
    assert set(scores) == set(TASKS)
    for name, score in scores.items():
        references = {len(answer.expected) for answer in answers if answer.task == name}
        share = 100 if name in QUESTION_TASKS else 100 / references.pop()
        assert score == pytest.approx(share if expected is None else expected), name


def test_answers_have_the_published_room_and_more_only_where_the_tokens_are_short(qa):
    prompts = RulerPrompts(grid_of(*TASKS, qa=qa), BYTE, 16)
    for prompt in prompts.grid.prompts(2500):
        text, published = prompts.write(prompt), TASKS[prompt.task].answer_tokens
        assert published <= text.answer_tokens <= published + 20
        assert 1 + text.prompt_tokens + text.answer_tokens <= 2500
        assert len(listed(text)) <= text.answer_tokens


def test_a_prompt_does_not_depend_on_the_rest_of_the_grid(qa):
    wide = RulerPrompts(grid_of(*TASKS, qa=qa, lengths_tokens=(2100, 2500), samples=3), BYTE, 16)
    alone = RulerPrompts(grid_of("cwe", "vt", samples=9), BYTE, 16)
    for task in ("cwe", "vt"):
        (prompt,) = [p for p in wide.grid.prompts(2500) if (p.task, p.sample) == (task, 2)]
        first, second = wide.write(prompt), alone.write(prompt)
        np.testing.assert_array_equal(first.read(0, first.prompt_tokens), second.read(0, second.prompt_tokens))


def test_tasks_are_chosen_by_name_and_group():
    without = tuple(name for name in TASKS if name not in QUESTION_TASKS)
    assert choose_tasks(None, ()) == without
    assert choose_tasks(None, ("qa_1",)) == (*without, "qa_1")
    assert choose_tasks(["vt", "niah"], ()) == without[:9] and choose_tasks(["qa"], ()) == QUESTION_TASKS
    assert choose_tasks(["fwe", "cwe", "cwe"], ()) == ("cwe", "fwe")


def test_everything_is_written_and_more_adds_to_it(run, call, capsys, qa):
    usual = ("--tasks", "niah_single_2", "fwe", "qa_1", "--samples", "1", "--lanes", "4")
    assert call("eval", "ruler", run, *usual, "--lengths", "700", "1K", "--qa", qa) == 0
    captured = capsys.readouterr()
    folder = run / "eval" / "ruler-1"
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and results["all"]["samples"] == 6 and results["haystack"] == "varied"
    assert [(c["length_tokens"], c["task"]) for c in results["cells"]][:2] == [(700, "niah_single_2"), (700, "fwe")]
    means = {row["length_tokens"]: row["score_percent"] for row in results["lengths"]}
    for length in (700, 1024):
        own = [c["score_percent"] for c in results["cells"] if c["length_tokens"] == length]
        assert means[length] == pytest.approx(sum(own) / 3)
    assert results["all"]["score_percent"] == pytest.approx(sum(means.values()) / 2)
    lines = (folder / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 6 and json.loads(lines[1])["evidence_tokens"]
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^task +700 +1K$", captured.out, re.MULTILINE)
    assert len(re.findall(r"^(?:niah_single_2|fwe|qa_1) +\S+ \(0-\S+\) ", captured.out, re.MULTILINE)) == 3
    assert "mean of 3 " in captured.out and "qa_2 left out: needs a file of questions (--qa)" in captured.out
    assert "the shipped sentences in random order take their place" in captured.out
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert "eval/ruler/score by task and length" in board.Tags()["images"]
    assert {"eval/ruler/mean of 3 tasks/700", "eval/ruler/references/fwe, 1K"} <= set(board.Tags()["scalars"])

    (run / "essays.txt").write_text("The sea was calm. " * 20)
    more = (*usual, "--lengths", "700", "--qa", qa, "--haystack", run / "essays.txt")
    assert call("eval", "ruler", run, *more, "--json") == 0
    captured = capsys.readouterr()
    assert "2 of 3 answers were there already" in captured.err, "only the task with essays is new"
    found = json.loads(captured.out)
    assert found["haystack"] == "essays.txt" and len(found["cells"][0]["source"]) == 12
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 1 + 7


def test_a_real_model_answers_all_tasks(run, qa):
    trained, said = open_trained(run), []
    grid = grid_of(*TASKS, qa=qa, samples=1, lengths_tokens=(2048,))
    results = run_measurement(RulerTest(trained, grid, lanes=13), report=said.append)
    assert results["complete"] and [cell["task"] for cell in results["cells"]] == list(TASKS)
    assert all(0 <= cell["score_percent"] <= 100 for cell in results["cells"])
    answers = [json.loads(line) for line in (run / "eval/ruler-1/answers.jsonl").read_text().splitlines()[1:]]
    assert all(answer["tokens"] <= 2048 - 30 and answer["said"] for answer in answers)


def test_a_stopped_test_goes_on(run, monkeypatch):
    trained, grid = open_trained(run), grid_of("vt", "niah_multikey_2", lengths_tokens=(700,), samples=3)
    batches = retrieval_test.answer_prompts

    def stop_in_the_second(*arguments, **options):
        for number, answers in enumerate(batches(*arguments, **options)):
            if number == 1:
                raise KeyboardInterrupt
            yield answers

    with monkeypatch.context() as patch:
        patch.setattr(retrieval_test, "answer_prompts", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_measurement(RulerTest(trained, grid, lanes=4), report=lambda line: None)
    said: list[str] = []
    stopped = run_measurement(RulerTest(trained, grid, lanes=4), report=said.append)
    assert said[0] == "4 of 6 answers were there already"
    whole = run_measurement(RulerTest(trained, grid, lanes=4), out=run / "whole", report=lambda line: None)
    assert stopped["cells"] == whole["cells"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "qa_2"), "--tasks: qa_2 needs a file of questions; give --qa FILE FILE"),
        (("--tasks", "vt", "--lengths", "500"), "--lengths: 500 can't hold vt, which takes at least "),
        (("--tasks", "all"), "invalid choice: 'all'"),
        (("--haystack", "none.txt"), "--haystack: none.txt can't be read (No such file or directory); give a text or"),
        (("--qa", "none.jsonl"), "--qa: none.jsonl can't be read (No such file or directory); give a .jsonl file"),
        (("--qa", "a", "b", "c"), "--qa: give at most 2 files, for qa_1 and qa_2"),
        (("--lengths", "4k4"), "--lengths: 4k4 is no length"),
        (("--lengths", "2K", "2K"), "--lengths: the same one is given twice"),
    ],
)
def test_mistakes_are_refused_in_one_line(run, call, capsys, options, message):
    assert call("eval", "ruler", run, *options) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (run / "eval").exists()


def test_more_samples_than_questions_are_refused(qa):
    with pytest.raises(ConfigError, match=r"--samples: .*qa.jsonl has no more than 4 questions for qa_1; lower it"):
        grid_of("qa_1", qa=qa, samples=5)
    assert grid_of("vt", qa=qa, samples=5).columns() == [("vt", "")]
