"""What is kept of a long measurement: it comes back, torn lines are dropped, and other settings are refused."""

import json

import pytest

from infini_train.config.errors import ConfigError
from infini_train.eval.passkey import PasskeyAnswer
from infini_train.eval.records import RecordFile, find_home

SETTINGS = {"wording": "paper", "seed": 0}


@pytest.mark.parametrize(
    ("checkpoint", "home"),
    [("runs/a/checkpoints/step-00000001", "runs/a"), ("models/passkey", "models/passkey")],
)
def test_results_go_to_the_run_or_to_a_checkpoint_of_its_own(checkpoint, home, tmp_path):
    assert find_home(tmp_path / checkpoint) == tmp_path / home


def answers_of(samples: int) -> list[PasskeyAnswer]:
    places = {"length_tokens": 300, "position": 0.1, "tokens": 290, "key_token": 17, "question_token": 250}
    measured = {"start_tokens_per_s": None, "end_tokens_per_s": 90.5, "lanes": 2, "peak_memory_bytes": 2**20}
    return [PasskeyAnswer(**places, **measured, sample=sample, key="123", said="12?") for sample in range(samples)]


def test_answers_come_back_from_disk(tmp_path):
    first, more = answers_of(4)[:3], answers_of(4)[3:]
    file = RecordFile(tmp_path / "new" / "answers.jsonl", PasskeyAnswer, SETTINGS)
    assert file.records == [] and not (tmp_path / "new").exists()
    file.append(first)
    RecordFile(tmp_path / "new" / "answers.jsonl", PasskeyAnswer, SETTINGS).append(more)
    again = RecordFile(tmp_path / "new" / "answers.jsonl", PasskeyAnswer, SETTINGS)
    assert again.records == first + more
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("torn", [1, 40])
def test_a_torn_line_is_asked_again(torn, tmp_path):
    path, answers = tmp_path / "answers.jsonl", answers_of(3)
    RecordFile(path, PasskeyAnswer, SETTINGS).append(answers)
    path.write_bytes(path.read_bytes()[:-torn])
    file = RecordFile(path, PasskeyAnswer, SETTINGS)
    assert file.records == answers[: 3 if torn == 1 else 2]  # only the line's end was lost
    file.append(answers_of(5)[len(file.records) :])
    assert RecordFile(path, PasskeyAnswer, SETTINGS).records == answers_of(5)


def test_answers_of_another_test_are_not_mixed(tmp_path):
    path = tmp_path / "answers.jsonl"
    RecordFile(path, PasskeyAnswer, SETTINGS).append(answers_of(2))
    with pytest.raises(ConfigError) as caught:
        RecordFile(path, PasskeyAnswer, {**SETTINGS, "seed": 1})
    assert str(caught.value) == (
        f"--out: {tmp_path} holds another test (seed: 0, not 1); name another folder, or pass --overwrite"
    )
    file = RecordFile(path, PasskeyAnswer, {**SETTINGS, "seed": 1}, overwrite=True)
    assert file.records == [] and len(RecordFile(path, PasskeyAnswer, SETTINGS).records) == 2, (
        "nothing is lost before there is more"
    )
    file.append(answers_of(1))
    assert json.loads(path.read_text().splitlines()[0]) == {"settings": {**SETTINGS, "seed": 1}}
    path.write_text("something else\n")
    with pytest.raises(ConfigError, match="holds no results of this test"):
        RecordFile(path, PasskeyAnswer, SETTINGS)
