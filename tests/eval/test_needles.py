"""Needle tests: prompts lie where they should, oracles score as they must, and the command writes, resumes, refuses."""

import json
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.needles import TASKS
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.eval import retrieval_test
from infini_train.eval.measurement import run_measurement
from infini_train.eval.needles import NeedleGrid, NeedlePrompts, NeedleTest
from infini_train.eval.retrieval import answer_prompts, summarise_answers
from infini_train.inference.loading import open_trained
from tests.eval.speaker import Speaker

BYTE = ByteTokenizer()
SMALL = ("--lengths", "900", "1K", "--needles", "2", "3", "--depths", "0", "1", "--samples", "2", "--lanes", "8")


def grid_of(task: str = "multikey", **changes) -> NeedleGrid:
    return NeedleGrid(**{"task": task, "lengths_tokens": (900, 1200), "needles": (2, 3), "samples": 3, **changes})


def say_share(share: float):
    """For `Speaker`: the answer, or half of it."""

    def speak(prompt, text) -> str:
        answer = text.needles.answer
        return " " + ", ".join(answer[: round(share * len(answer))])

    return speak


@pytest.mark.parametrize("task", TASKS)
def test_oracles_score_as_they_must(task):
    prompts = NeedlePrompts(grid_of(task, samples=2, needles=(2, 4)), BYTE, 16)
    for share in (1.0, 0.5):
        answers = [a for batch in answer_prompts(Speaker(prompts, say_share(share)), prompts, lanes=4) for a in batch]
        found = summarise_answers(prompts.grid, answers, 16, "word", ())
        one = task in ("single", "multikey")
        assert found["complete"] and len(found["cells"]) == 2 * (3 if task == "single" else 6 if one else 2)
        assert found["all"]["exact_match"] == (1.0 if share == 1 else 0.0)
        assert found["all"]["word_accuracy"] == (1.0 if share == 1 else 0.0 if one else 0.5)


def test_the_asked_needle_lies_at_its_depth_in_all_phases():
    prompts = NeedlePrompts(grid_of(lengths_tokens=(3000,), samples=24, depths=(0.0, 0.5, 1.0)), BYTE, 16)
    phases = set()
    for prompt in prompts.grid.prompts(3000):
        text = prompts.write(prompt)
        assert 3000 - 16 <= text.tokens + 1 <= 3000
        (asked,) = text.needles.asked
        place = text.needle_spans[asked].start
        phases.add(place % 16)
        first, last = len(prompts._intro), text.question_token
        if prompt.depth == 0:
            assert place - first <= 16 + 400
        else:
            assert abs((place - first) / (last - first) - prompt.depth) < 0.2
        assert text.needles.answer[0] in text.needles.sentences[asked]
    assert len(phases) > 12


def test_a_prompt_does_not_depend_on_the_rest_of_the_grid():
    wide = NeedlePrompts(grid_of(), BYTE, 16)
    alone = NeedlePrompts(grid_of(lengths_tokens=(1200,), needles=(3,), depths=(0.5,), samples=9), BYTE, 16)
    (prompt,) = [p for p in wide.grid.prompts(1200) if p == (1200, 3, 0.5, 1)]
    first, second = wide.write(prompt), alone.write(prompt)
    np.testing.assert_array_equal(first.read(0, first.tokens), second.read(0, second.tokens))


def test_another_wording_asks_for_the_same_values_in_other_words():
    usual, other = (NeedlePrompts(grid_of(wording=name), BYTE, 16) for name in ("pass_key", "magic"))
    for prompt in usual.grid.prompts(2048):
        texts = [prompts.write(prompt) for prompts in (usual, other)]
        whole = [BYTE.decode(text.read(0, text.tokens)) for text in texts]
        assert texts[0].needles.answer == texts[1].needles.answer
        assert "special magic number" in whole[1] and "pass key" not in whole[1] and "magic" not in whole[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "none"}, "--task: none: no such task; choose one of single, multikey"),
        ({"wording": "none"}, "--wording: none: no such wording; choose one of pass_key, magic, locker"),
        ({"wording": "magic", "task": "variables"}, "--wording: variables has its own; leave it out"),
        ({"needles": (0,)}, "--needles: must be positive"),
        ({"needles": (2, 2)}, "--needles: the same one is given twice"),
        ({"needles": (1000,)}, "--needles: 1000 are too many; at most"),
        ({"depths": (1.5,)}, "--depths: give at least one, each between 0"),
        ({"lengths_tokens": ()}, "--lengths: give at least one, each positive"),
        ({"seed": -1}, "--seed: must not be negative"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        grid_of(**changes)


def test_needles_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"--lengths: 900 can't hold 20 needles .* take up to \d{4} tokens; raise it"):
        NeedlePrompts(grid_of(needles=(20,)), BYTE, 16)


def test_everything_is_written(run, call, capsys):
    assert call("eval", "needles", run, *SMALL) == 0
    said = capsys.readouterr().out
    folder = run / "eval" / "needles-1-multikey-repeated"
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and results["all"]["samples"] == 2 * 2 * 2 * 2
    assert [c["needles"] for c in results["cells"]][:4] == [2, 2, 3, 3]
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 1 + 16
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^ +(?:900|1K) ", said, re.MULTILINE)) == 8 and "all words right" in said
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert "eval/needles-multikey-repeated/words by length and needles" in board.Tags()["images"]


def test_prose_is_read_and_told_when_it_is_short(run, call, capsys, tmp_path):
    (tmp_path / "essays.txt").write_text("The sea was calm. " * 20)
    options = ("--task", "single", "--haystack", tmp_path / "essays.txt", "--lengths", "900", "--samples", "1")
    assert call("eval", "needles", run, *options, "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["haystack"] == "prose" and len(found["haystack_sha256"]) == 64 and len(found["cells"]) == 3
    assert "the haystack has 360 tokens; longer prompts meet parts of it again" in captured.err
    (tmp_path / "essays.txt").write_text("Another sea. " * 20)
    assert call("eval", "needles", run, *options) == 2
    assert "holds another test (haystack_sha256:" in capsys.readouterr().err


def test_a_stopped_test_goes_on(run, monkeypatch):
    trained, grid = open_trained(run), grid_of("variables", needles=(2,), samples=4)
    batches = retrieval_test.answer_prompts

    def stop_in_the_second(*arguments, **options):
        for number, answers in enumerate(batches(*arguments, **options)):
            if number == 1:
                raise KeyboardInterrupt
            yield answers

    with monkeypatch.context() as patch:
        patch.setattr(retrieval_test, "answer_prompts", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_measurement(NeedleTest(trained, grid, lanes=3), report=lambda line: None)
    said: list[str] = []
    stopped = run_measurement(NeedleTest(trained, grid, lanes=3), report=said.append)
    assert said[0] == "3 of 8 answers were there already"
    whole = run_measurement(NeedleTest(trained, grid, lanes=3), out=run / "whole", report=lambda line: None)
    assert stopped["cells"] == whole["cells"]
