"""The tasks against the published definitions (RULER, scripts/synthetic.yaml), and its two ways to match."""

import pytest

from infini_train.data.synthetic.ruler.tasks import ESSAY_TASKS, TASKS, NeedleTask, find_references

# hay, kind of key, kind of value, keys, values, queries
PUBLISHED = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needles", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needles", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
PUBLISHED_ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} | dict.fromkeys(PUBLISHED, 128)


def test_the_tasks_are_the_published_ones():
    found = {
        name: (task.hay, task.key, task.value, task.keys, task.values, task.queries)
        for name, task in TASKS.items()
        if isinstance(task, NeedleTask)
    }
    assert found == PUBLISHED
    assert {name: task.answer_tokens for name, task in TASKS.items()} == PUBLISHED_ANSWER_TOKENS
    assert [name for name, row in PUBLISHED.items() if row[0] == "essay"] == list(ESSAY_TASKS)
    assert TASKS["vt"].hops == 4 and TASKS["fwe"].alpha == 2.0 and TASKS["fwe"].letters == 6
    assert TASKS["cwe"].long == (30, 3, 10, 3, 40) and TASKS["cwe"].short == (6, 1, 3, 1, 20)


@pytest.mark.parametrize(
    ("references", "said", "expected"),
    [
        (["Apple", "pear"], "an APPLE.", [True, False]),
        (["art"], "party", [True]),  # inside of words too, as published
        (["1234567"], "123456", [False]),
        (["a", "b"], "", [False, False]),
    ],
)
def test_references_match_as_published(references, said, expected):
    assert find_references(references, said) == expected
