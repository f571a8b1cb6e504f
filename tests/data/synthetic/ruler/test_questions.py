"""Questions: their own documents are always there, others once before any comes again; bad files are refused."""

import json
import re

import pytest

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.ruler.questions import read_questions


def documents_of(whole: str) -> list[str]:
    """The documents of a prompt, checked for their numbers."""
    body = whole.split("These are the documents.\n\n")[1].rsplit("\n\nAnswer the question", 1)[0]
    parts = [re.fullmatch(r"Document (\d+):\n(.+)", part) for part in body.split("\n\n")]
    assert [int(part[1]) for part in parts] == list(range(1, len(parts) + 1))
    return [part[2] for part in parts]


@pytest.mark.parametrize("sample", [0, 1, 29])
def test_the_documents_are_there_and_others_are_taken_in_turn(writer, read_whole, questions, tokenizer, sample):
    asked = questions.questions[sample]
    own, related = ({questions.documents[i] for i in numbers} for numbers in (asked.context, asked.related))
    assert own < related and {f"Item {i} is in room {i}. It is blue." for i in range(sample % 10, 30, 10)} <= related
    for length_tokens in (700, 2000, 20_000):
        text = writer.draft("qa_1", length_tokens, sample, [1, sample]).place(length_tokens)
        whole = read_whole(text)
        found = documents_of(whole)
        assert own <= set(found) and text.references == asked.answers == (f"room {sample}", asked.answers[1])
        assert whole.endswith(f"Question: Where is item {sample}? Answer:")
        assert whole.count("Answer the question from the documents.") == 2
        if len(found) >= len(own | related):
            assert related <= set(found), "those of the group come before any other"
        if len(found) <= len(questions.documents):
            assert len(set(found)) == len(found)
        else:
            assert set(found) == set(questions.documents)
        places = [
            tokenizer.decode(text.read(p, min(p + 90, text.prompt_tokens))).lstrip() for p in text.evidence_tokens
        ]
        assert {re.match(r"Document \d+:\n(.+)", place)[1].strip() for place in places} >= own


def test_own_documents_lie_anywhere(writer, read_whole):
    places = []
    for sample in range(30):
        draft = writer.draft("qa_2", 2500, sample, [2, sample])
        found = documents_of(read_whole(draft.place(draft.min_tokens + 400)))  # of 40 documents, some
        places += [i / (len(found) - 1) for i, document in enumerate(found) if f"Item {sample} is in" in document]
    assert len(places) == 30 and min(places) < 0.2 and max(places) > 0.8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", r"qa.jsonl:2: is no JSON; every line must be an object with question, answers, context"),
        ("[1]", r'qa.jsonl:2: needs a "question", a text'),
        ('{"question": " "}', r'qa.jsonl:2: needs a "question", a text'),
        ('{"question": "a?", "context": ["b"]}', r'"answers" must be a list of texts'),
        ('{"question": "a?", "answers": [], "context": ["b"]}', r'"answers" must not be empty'),
        (
            '{"question": "a?", "answers": ["c"], "context": "b"}',
            r'"context" must be a list of texts, none of them empty',
        ),
        ('{"question": "a?", "answers": ["c"], "context": ["b", ""]}', r'"context" must be a list of texts, none of'),
        ('{"question": "a?", "answers": ["c"], "context": ["b"], "group": 3}', r'"group" must be a text'),
    ],
)
def test_bad_lines_are_refused(tmp_path, line, message):
    good = json.dumps({"question": "a?", "answers": ["c"], "context": ["b"]})
    (tmp_path / "qa.jsonl").write_text(f"{good}\n{line}\n\n")
    with pytest.raises(ConfigError, match=message):
        read_questions(tmp_path / "qa.jsonl")


def test_files_without_questions_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="empty.jsonl holds no question"):
        read_questions(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="latin.jsonl is not UTF-8 text"):
        read_questions(tmp_path / "latin.jsonl")
    with pytest.raises(ConfigError, match=r"none.jsonl can't be read .*; give a .jsonl file of questions"):
        read_questions(tmp_path / "none.jsonl")
