"""Grids as they are given, and scores of answers."""

import math

import pytest

from infini_train.config.errors import ConfigError
from infini_train.eval.passkey import PasskeyAnswer, PasskeyGrid
from infini_train.eval.retrieval import RetrievalScore, score_cells, summarise_answers
from infini_train.eval.retrieval_test import parse_depths


def grid_of(**changes) -> PasskeyGrid:
    return PasskeyGrid(**{"lengths_tokens": (300, 420), "depths": (0.0, 1.0), "samples": 2, **changes})


def answer(length: int, position: float, sample: int, said: str, **changes) -> PasskeyAnswer:
    measured = {"start_tokens_per_s": 100.0, "end_tokens_per_s": 90.0, "lanes": 2, "peak_memory_bytes": 2**20 * length}
    places = {"tokens": length - 5, "key_token": 17 + sample, "question_token": length - 40}
    return PasskeyAnswer(
        **{"length_tokens": length, "position": position, "sample": sample, "key": "12345", "said": said},
        **{**measured, **places, **changes},
    )


def test_answers_are_counted_by_cell_length_and_all():
    answers = [
        answer(300, 0.0, 0, "12345"),
        answer(300, 0.0, 1, "12?45"),
        answer(300, 1.0, 0, "54321"),
        answer(420, 0.0, 0, "12345", start_tokens_per_s=None, end_tokens_per_s=70.0),
        answer(420, 0.0, 1, "12345"),
    ]
    found = summarise_answers(grid_of(), answers, 16)
    assert not found["complete"]
    cells = {
        (cell["length_tokens"], cell["position"]): (cell["exact"], cell["right_digits"]) for cell in found["cells"]
    }
    assert cells == {(300, 0.0): (1, 9), (300, 1.0): (0, 1), (420, 0.0): (2, 10)}
    assert [(at["samples"], at["exact"], at["digits"], at["peak_memory_mb"]) for at in found["lengths"]] == [
        (3, 1, 15, 300.0),
        (2, 2, 10, 420.0),
    ]
    assert found["all"]["exact_match"] == 0.6 and found["all"]["digit_accuracy"] == 20 / 25
    assert found["all"]["exact_match_95"] == pytest.approx([0.2307, 0.8824], abs=1e-4)
    assert (found["key_phases"], found["question_phases"]) == (2, 2)
    assert (found["start_tokens_per_s"], found["end_tokens_per_s"]) == (100.0, 80.0), "medians at the longest length"


def test_answers_outside_the_grid_do_not_count():
    answers = [answer(300, 0.0, 0, "12345"), answer(300, 0.5, 0, "12345"), answer(300, 0.0, 2, "12345")]
    assert score_cells(grid_of(), answers) == {(300, 0.0): RetrievalScore(1, 1, 5, 5)}


def test_nothing_has_no_share():
    nothing = RetrievalScore.of([])
    assert math.isnan(nothing.exact_match) and math.isnan(nothing.accuracy)
    assert nothing.exact_interval == nothing.interval == (0.0, 1.0)


def test_depths_are_read():
    assert parse_depths(["0", "0.5", "1"]) == (0.0, 0.5, 1.0)
    assert parse_depths(["5"]) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert parse_depths(["1"]) == (1.0,) and parse_depths(["0"]) == (0.0,)


@pytest.mark.parametrize(
    ("action", "line"),
    [
        (lambda: parse_depths(["start"]), "--depths: start: write numbers from 0 (start) to 1 (end)"),
        (lambda: grid_of(depths=(0.5, 1.5)), "--depths: give at least one, each between 0 (start) and 1 (end)"),
        (
            lambda: grid_of(depths=(float("nan"),)),
            "--depths: give at least one, each between 0 (start) and 1 (end)",
        ),
        (lambda: grid_of(lengths_tokens=(0,)), "--lengths: give at least one, each positive"),
        (lambda: grid_of(lengths_tokens=(300, 300)), "--lengths: the same one is given twice"),
        (lambda: grid_of(samples=0), "--samples: must be positive"),
        (lambda: grid_of(digits=0), "--digits: must be positive"),
        (lambda: grid_of(seed=-1), "--seed: must not be negative"),
    ],
)
def test_impossible_grids_are_refused(action, line):
    with pytest.raises(ConfigError) as caught:
        action()
    assert str(caught.value) == line
