"""Summaries of books: read in any company, written as by generate, resumed, scored by ROUGE with intervals."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.config.errors import ConfigError
from infini_train.data.pairs import PairForm
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.eval.rouge import MEASURES, lead, make_scorer
from infini_train.eval.summaries import score, summarise_scores
from infini_train.eval.summary_writing import PAPER, Book, SummaryTask, Written, _own_stream, write_summaries
from infini_train.inference.generation import continue_from
from infini_train.inference.sampling import Sampling

pytest.importorskip("rouge_score")

MODEL = Path(__file__).resolve().parent.parent.parent / "models" / "passkey-linear"
BYTE = ByteTokenizer()
BOOKS = [
    {"id": f"b{i}", "book": f"Book {i} begins. It goes on! Does it? " * (2 * i + 1), "summary": f"Book {i} goes on."}
    for i in range(4)
]


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps(book) + "\n" for book in BOOKS))
    return path


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("lanes", [1, 3])
def test_summaries_are_those_of_each_book_alone(variant, lanes, tools, data):
    model, form = tools.build(variant), PairForm(prompt="Read: ", separator="\n=")
    task = SummaryTask(data=data, max_new_tokens=9, samples=2, form=form, max_book_tokens=120)
    written = [record for batch in write_summaries(model, BYTE, task, lanes=lanes) for record in batch]
    assert [(record.number, record.sample) for record in written] == [(i, s) for i in range(4) for s in range(2)]
    for record in written:
        prompt = [BYTE.bos_id, *form.encode_book(BYTE, BOOKS[record.number]["book"], 120).tolist()]
        ids = list(
            continue_from(
                model,
                prompt,
                None,
                max_new_tokens=9,
                stop_id=BYTE.eos_id,
                sampling=_own_stream(PAPER, record.number, record.sample),
            )
        )
        assert record.said == BYTE.decode(ids).strip()
        assert (record.book_tokens, record.said_tokens) == (len(prompt), len(ids))


def test_the_defaults_are_the_papers(data):
    task = SummaryTask(data=data)
    assert (task.sampling.temperature, task.sampling.top_p, task.sampling.top_k) == (0.5, 0.95, 0)
    assert task.max_new_tokens == 1024


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def evaluate(call: Callable[..., int]) -> Callable[..., int]:
    def run(data: Path, out: Path, *options: object) -> int:
        return call("eval", "summarise", MODEL, "--data", data, "--out", out, "--max-new-tokens", 5, *options)

    return run


def test_the_command_writes_scores_texts_and_scalars_and_goes_on(evaluate, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert evaluate(data, out, "--books", 2, "--lanes", 2) == 0
    first = (out / "summaries.jsonl").read_text()
    assert "books 1 to 2: " in capsys.readouterr().out
    assert evaluate(data, out, "--lanes", 3, "--samples", 2, "--json") == 0
    said = capsys.readouterr()
    assert "2 summaries were there already" in said.err
    assert (out / "summaries.jsonl").read_text().startswith(first)
    results = json.loads(said.out)
    assert results["complete"] and results["model"]["books"] == 4 and results["samples"] == 2
    whole = tmp_path / "whole"
    assert evaluate(data, whole, "--lanes", 1, "--samples", 2) == 0

    def texts(folder: Path) -> set[tuple]:
        rows = map(json.loads, (folder / "summaries.jsonl").read_text().splitlines()[1:])
        return {(row["number"], row["sample"], row["said"]) for row in rows}

    assert texts(out) == texts(whole) and len(texts(out)) == 8
    shown = (out / "summaries.txt").read_text()
    assert shown.count("=== ") == 8 and "--- reference\nBook 3 goes on." in shown
    board = EventAccumulator(str(out / "tensorboard" / "eval")).Reload()
    assert {f"eval/out/{name}" for name in (*MEASURES, "overall")} == set(board.Tags()["scalars"])
    assert any("b0" in tag for tag in board.Tags()["tensors"])


def test_other_settings_are_not_mixed_in(evaluate, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(data, out, "--books", 1) == 0
    assert evaluate(data, out, "--books", 1, "--seed", 1) == 2
    assert "holds another test (seed: 0, not 1)" in capsys.readouterr().err
    assert evaluate(data, out, "--books", 1, "--seed", 1, "--overwrite") == 0


def test_what_a_killed_run_left_is_kept(evaluate, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(data, out) == 0
    whole = (out / "summaries.jsonl").read_text()
    torn = whole[: whole.rindex("said") + 9]
    (out / "summaries.jsonl").write_text(torn)
    assert evaluate(data, out) == 0
    assert "3 summaries were there already" in capsys.readouterr().out
    assert len((out / "summaries.jsonl").read_text().splitlines()) == len(whole.splitlines()) == 5


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "holds no books"),
        ("{", "record 1: is not valid JSON"),
        ('{"book": "a"}', "no text in field 'summary'; the fields are book; see --summary-field"),
        ('{"story": "a", "summary": "b"}', "no text in field 'book'; the fields are story, summary; see --text-field"),
        ("[]", "record 1: is not a JSON object"),
        ('{"book": ' + "[" * 100_000, "record 1: is not valid JSON: maximum recursion depth exceeded"),
        ('{"book": "a\\ud800", "summary": "b"}', "record 1: character 1 of field 'book' is half a surrogate pair"),
    ],
)
def test_bad_data_are_named(evaluate, text, line, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(text)
    assert evaluate(tmp_path / "bad.jsonl", tmp_path / "out") == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_packed_books_are_the_same_and_torn_ones_are_named(evaluate, data, tmp_path, capsys):
    packed = tmp_path / "books.jsonl.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    assert list(SummaryTask(data=packed).read_books()) == list(SummaryTask(data=data).read_books())
    packed.write_bytes(packed.read_bytes()[:-20])
    assert evaluate(packed, tmp_path / "out") == 2
    assert "can't be read on" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- ROUGE


def test_means_their_geometric_mean_and_intervals():
    rows = np.random.default_rng(0).random((40, 3))
    found = summarise_scores(rows)
    means = 100 * rows.mean(0)
    assert [found[name] for name in MEASURES] == pytest.approx(means)
    assert found["overall"] == pytest.approx(np.prod(means) ** (1 / 3))
    error = 100 * rows.std(0) / np.sqrt(40)
    for column, name in enumerate(MEASURES):
        low, high = found[f"{name}_95"]
        assert (high - low) / 2 == pytest.approx(1.96 * error[column], rel=0.1)
    assert summarise_scores(rows) == found, "always the same draws"
    assert summarise_scores([[0.5, 0.2, 0.4]])["rouge1_95"] == [50.0, 50.0]


def test_what_costs_nothing_is_scored_beside():
    scorer = make_scorer()
    books = [Book(i, f"b{i}", lead(b["book"]), b["summary"]) for i, b in enumerate(BOOKS)]
    task = {"book_tokens": 9, "said_tokens": 2, "ended": True, "read_s": 1.0, "write_s": 1.0, "lanes": 4}
    written = [
        Written(number=i, sample=s, id=f"b{i}", said=books[i].reference if s else "", peak_memory_bytes=1, **task)
        for i in range(4)
        for s in range(2)
    ]
    found = score(books, written, scorer)
    assert found["model"]["rouge1"] == pytest.approx(50), "a right and an empty sample of each book"
    assert found["random"]["rouge1"] == pytest.approx(75), "another number in: Book 2 goes on"
    assert found["lead_3"]["rouge1"] < 75
    assert found["read_tokens_per_s"] == pytest.approx(36)


def test_an_impossible_task_is_refused(data):
    with pytest.raises(ConfigError, match="^--max-new-tokens: must be positive"):
        SummaryTask(data=data, max_new_tokens=0)
    assert Sampling(temperature=0.5) != PAPER
