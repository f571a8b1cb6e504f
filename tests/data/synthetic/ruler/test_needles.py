"""Needles and variables: how many there are, of which kinds, where they lie; the answer follows from the text."""

import re
import uuid

import numpy as np
import pytest

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.ruler.needles import DEPTHS, NOISE, read_essays, split_sentences
from infini_train.data.synthetic.ruler.tasks import TASKS, NeedleTask
from infini_train.data.synthetic.ruler.writer import RulerWriter
from infini_train.data.synthetic.wordings import SENTENCES
from infini_train.data.tokenizer import ByteTokenizer

NEEDLE = re.compile(r"One of the special magic (\w+) for ([^\n]+?) is: ([\w-]+)\.")
KINDS = {"words": r"[a-z]+-[a-z]+", "numbers": r"[1-9]\d{6}", "uuids": r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}"}
NEEDLE_TASKS = [name for name, task in TASKS.items() if isinstance(task, NeedleTask)]


@pytest.mark.parametrize("name", NEEDLE_TASKS)
@pytest.mark.parametrize("length_tokens", [1500, 6000])
def test_the_needles_are_as_defined(writer, read_whole, name, length_tokens):
    task = TASKS[name]
    for seed in range(4):
        text = writer.draft(name, length_tokens, 0, [seed]).place(length_tokens)
        whole = read_whole(text)
        body, asked = whole.rsplit("\n", 1)
        needles = NEEDLE.findall(body)
        assert {kind for kind, _, _ in needles} == {task.value}
        assert all(re.fullmatch(KINDS[task.key], key) and re.fullmatch(KINDS[task.value], v) for _, key, v in needles)
        queries = re.split(r", and |, ", re.search(r"for (.+) does the text", asked)[1])
        assert len(queries) == task.queries
        assert [v for query in queries for v in sorted(v for _, key, v in needles if key == query)] == [
            v for i in range(task.queries) for v in sorted(text.references[i * task.values : (i + 1) * task.values])
        ]
        if task.hay != "needles":
            assert len(needles) == task.keys * task.values
            assert len({key for _, key, _ in needles}) == task.keys
        else:
            assert len(needles) > 5 and NEEDLE.sub("", body).split("\n")[1:] == [""] * len(needles)
        many = len(text.references) > 1
        kind = task.value if many else task.value[:-1]
        assert whole.startswith(f"{'Some' if many else 'A'} special magic {kind}")
        assert asked.endswith(
            f"The special magic {kind} for {re.search('for (.+) does', asked)[1]} mentioned in the"
            f" provided text {'are' if many else 'is'}"
        )


@pytest.mark.parametrize("name", [*NEEDLE_TASKS, "vt"])
def test_the_places_of_the_evidence_are_those_in_the_text(writer, tokenizer, name):
    for seed in range(6):
        text = writer.draft(name, 2500, 0, [seed]).place(2500)
        assert len(text.evidence_tokens) == len(text.references)
        for place in text.evidence_tokens:
            after = tokenizer.decode(text.read(place, min(place + 130, text.prompt_tokens))).lstrip()
            assert after.startswith(("One of the special magic", "VAR ")), after
            assert any(reference in after for reference in text.references)


def test_noise_lines_hide_the_needle_anywhere():
    writer, places = RulerWriter(ByteTokenizer(), None, {}), []
    for seed in range(40):
        text = writer.draft("niah_single_1", 3000, 0, [seed]).place(3000)
        lines = bytes(text.read(0, text.prompt_tokens).tolist()).decode().split("\n")[1:-1]
        assert lines.count(NOISE) == len(lines) - 1
        (found,) = (i for i, line in enumerate(lines) if line != NOISE)
        assert NEEDLE.fullmatch(lines[found])
        places.append(found / (len(lines) - 1))
    assert min(places) < 0.1 and max(places) > 0.8 and 0.3 < np.mean(places) < 0.7


def test_needles_in_essays_lie_at_forty_depths(tmp_path):
    (tmp_path / "essays.txt").write_text(" ".join(f"This is sentence number {i}." for i in range(200)))
    essays, depths = read_essays(tmp_path / "essays.txt"), set()
    writer = RulerWriter(ByteTokenizer(), essays, {})
    for seed in range(40):
        text = writer.draft("niah_multikey_1", 8000, 0, [seed]).place(8000)
        whole = bytes(text.read(0, text.prompt_tokens).tolist()).decode()
        body = whole.split("\n", 1)[1].rsplit("\n", 1)[0]
        found = split_sentences([body])
        hay = [sentence for sentence in found if not NEEDLE.fullmatch(sentence)]
        assert hay == [essays.sentences[i % 200] for i in range(len(hay))], "from the first sentence on, and again"
        before, seen = [], 0
        for sentence in found:
            before += [seen] if NEEDLE.fullmatch(sentence) else []
            seen += sentence in essays.sentences
        assert set(before) <= {int(len(hay) * depth) for depth in DEPTHS} and len(set(before)) == 4
        depths |= {round(place / len(hay), 1) for place in before}
    assert depths >= {0.0, 0.5, 1.0}


def test_without_essays_sentences_come_in_random_order(writer, read_whole):
    first, second = (read_whole(writer.draft("niah_single_2", 2500, 0, [seed]).place(2500)) for seed in range(2))
    for whole in (first, second):
        body = whole.split("\n", 1)[1].rsplit("\n", 1)[0]
        assert {*split_sentences([NEEDLE.sub("", body)])} <= set(split_sentences(SENTENCES))
    assert first[200:600] != second[200:600]


def test_distractors_have_neither_the_key_nor_the_value(writer, read_whole):
    for name in ("niah_multikey_2", "niah_multikey_3"):
        text = writer.draft(name, 30_000, 0, [1]).place(30_000)
        whole = read_whole(text)
        (value,) = text.references
        query = re.search(r"for (\S+) does the text", whole)[1]
        assert whole.count(value) == 1 and whole.count(f"for {query} is:") == 1


def test_a_chain_is_in_order_and_gives_the_answer(writer, read_whole):
    for seed in range(8):
        text = writer.draft("vt", 2000, 0, [seed]).place(2000)
        whole = read_whole(text)
        lines = [line for line in whole.split("\n") if line.startswith("VAR ")]
        value = re.search(r"assigned the value (\d{5}) in the text", whole)[1]
        names = [re.match(r"VAR ([A-Z]{5}) = ", line)[1] for line in lines]
        assert lines == [f"VAR {name} = {f'VAR {names[i - 1]}' if i else value}" for i, name in enumerate(names)]
        assert tuple(names) == text.references and len(set(names)) == 5
        assert whole.endswith(f"5 variables are assigned the value {value}, they are:")
        others = [line for line in whole.split("\n")[2:-1] if not line.startswith("VAR ")]
        assert set(others) == {NOISE}


def test_uuids_are_of_version_four():
    text = RulerWriter(ByteTokenizer(), None, {}).draft("niah_single_3", 2000, 0, [1]).place(2000)
    assert uuid.UUID(text.references[0]).version == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('He said "No." Then\n\n he left!  Why? ', ['He said "No."', "Then he left!", "Why?"]),
        ("Pi is 3.14 or so. U.S. law", ["Pi is 3.14 or so.", "U.S.", "law"]),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002", ["\u4f60\u597d\u3002", "\u518d\u89c1\u3002"]),
        ("x" * 2500, ["x" * 1000, "x" * 1000, "x" * 500]),
    ],
)
def test_sentences_are_split(text, expected):
    assert split_sentences([text]) == expected


def test_essays_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none.txt can't be read .*; give a text or .jsonl file"):
        read_essays(tmp_path / "none.txt")
