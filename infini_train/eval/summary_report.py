"""A test of summaries as a measurement: scores, texts to read, and the results as a table."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from infini_train.atomic_files import write_atomic
from infini_train.eval.loading import Trained
from infini_train.eval.measurement import Measurement
from infini_train.eval.rouge import MEASURES, lead, make_scorer, summarise_scores
from infini_train.eval.summaries import Book, SummaryTask, Written, write_summaries

TEXTS = "summaries.txt"
SHOWN = 5  # summaries in TensorBoard
Scorer = Callable[[str, str], dict[str, float]]


class SummaryTest(Measurement[Written]):
    """Summaries of the books of a task, and their scores.

    Args:
        trained: the model.
        task: which books, and how.
        lanes: books read side by side.

    Raises:
        ConfigError: the data can't be read, or rouge-score is not installed.
    """

    file, record = "summaries.jsonl", Written

    def __init__(self, trained: Trained, task: SummaryTask, *, lanes: int) -> None:
        self.scorer, self.task, self.lanes = make_scorer(), task, lanes
        super().__init__(trained, "summarise", f"-{task.data.name.split('.')[0]}", task.settings())
        self.about = {"samples": task.samples}

    @cached_property
    def books(self) -> list[Book]:
        """With their first three sentences for a text, so that a test of any size fits into memory."""
        return [book._replace(text=lead(book.text)) for book in self.task.read_books()]

    def own(self, records: Sequence[Written]) -> list[Written]:
        """The summaries that the task asks for."""
        return [one for one in records if one.number < len(self.books) and one.sample < self.task.samples]

    def plan(self, records: Sequence[Written]) -> tuple[list[str], int | None]:
        """See `Measurement.plan`."""
        return [f"{len(records)} summaries were there already"] if records else [], None

    def measure(self, records: Sequence[Written], on_progress: Callable[[int], object]) -> Iterator[Sequence[Written]]:
        """See `Measurement.measure`."""
        done = {(record.number, record.sample) for record in records}
        model, tokenizer = self.trained.model, self.trained.tokenizer
        return write_summaries(model, tokenizer, self.task, lanes=self.lanes, done=done, on_progress=on_progress)

    def tell(self, batch: Sequence[Written], records: Sequence[Written]) -> Iterator[str]:
        """See `Measurement.tell`."""
        first, last = batch[0].number + 1, batch[-1].number + 1
        tokens = sum({record.number: record.book_tokens for record in batch}.values())
        yield (
            f"books {first} to {last}: {tokens:,} tokens read in {batch[0].read_s:,.1f} s,"
            f" {sum(record.said_tokens for record in batch):,} written in"
            f" {sum(record.write_s for record in batch):,.1f} s"
        )

    def summarise(self, records: Sequence[Written]) -> dict[str, Any]:
        """See `Measurement.summarise`."""
        return score(self.books, self.own(records), self.scorer)

    def write(self, records: Sequence[Written], results: dict[str, Any], folder: Path, board: SummaryWriter) -> None:
        """See `Measurement.write`."""
        found, step = self.own(records), self.trained.step
        texts = [_show(self.books[record.number], record) for record in found]
        write_atomic(folder / TEXTS, "\n\n".join(texts) + "\n")
        for key in (*MEASURES, "overall"):
            board.add_scalar(f"eval/{folder.name}/{key}", results["model"][key], step)
        for record, text in zip(found[:SHOWN], texts, strict=False):
            board.add_text(f"eval/{folder.name}/{record.id}", text.replace("\n", "  \n"), step)


def score(books: Sequence[Book], written: Sequence[Written], scorer: Scorer) -> dict[str, Any]:
    """ROUGE of the summaries and of two that cost nothing: a book's first three sentences, another book's reference.

    Samples of a book are averaged first: what was drawn at random are books.

    Args:
        books: all of the test, `text` the first sentences.
        written: at least one.
        scorer: see `make_scorer`.
    """
    numbers = sorted({record.number for record in written})

    def measure(texts_of: Callable[[int], list[str]]) -> dict[str, Any]:
        rows = []
        for number in numbers:
            scores = [scorer(books[number].reference, text) for text in texts_of(number)]
            rows.append([float(np.mean([one[name] for one in scores])) for name in MEASURES])
        return summarise_scores(rows)

    said: dict[int, list[str]] = {number: [] for number in numbers}
    for record in written:
        said[record.number].append(record.said)
    tokens = [record.book_tokens for record in written]
    read_s = sum({record.read_s for record in written})  # the same for all of a batch
    found = {
        "complete": len(numbers) == len(books),
        "book_tokens": {"min": min(tokens), "mean": float(np.mean(tokens)), "max": max(tokens)},
        "said_tokens": float(np.mean([record.said_tokens for record in written])),
        "ended": float(np.mean([record.ended for record in written])),
        "read_tokens_per_s": sum({record.number: record.book_tokens for record in written}.values()) / read_s,
        "peak_memory_mb": max(record.peak_memory_bytes for record in written) / 2**20,
        "model": measure(lambda number: said[number]),
        "lead_3": measure(lambda number: [books[number].text]),
    }
    if len(books) > 1:  # there is another book
        found["random"] = measure(lambda number: [books[(number + 1) % len(books)].reference])
    return found


def format_results(results: dict[str, Any]) -> str:
    """A table in percent, and what was measured beside."""
    tokens = results["book_tokens"]
    lines = [
        f"{results['checkpoint']}, step {results['step']}",
        f"{results['model']['books']} books of {tokens['min']:,} to {tokens['max']:,} tokens,"
        f" {results['samples']} a book; temperature {results['temperature']}, top-p {results['top_p']},"
        f" seed {results['seed']}",
        "F1 in %, with 95 % intervals by bootstrap over books; overall: the geometric mean",
        "",
        f"{'':<12}{'ROUGE-1':>20}{'ROUGE-2':>20}{'ROUGE-L':>20}{'overall':>20}",
    ]
    for name, label in (("model", "model"), ("lead_3", "lead-3"), ("random", "random")):
        if name in results:
            row = results[name]
            cells = (_with_interval(row[key], row[f"{key}_95"]) for key in (*MEASURES, "overall"))
            lines.append(f"{label:<12}" + "".join(f"{cell:>20}" for cell in cells))
    lines += [
        "",
        f"{results['said_tokens']:.0f} tokens a summary, {100 * results['ended']:.0f} % of them ended by themselves;"
        f" {results['read_tokens_per_s']:,.0f} tokens/s read, peak memory {results['peak_memory_mb']:,.0f} MB",
        "lead-3: the book's first three sentences; random: another book's reference",
        f"written to {results['folder']}",
    ]
    return "\n".join(lines)


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} ({interval[0]:.1f}-{interval[1]:.1f})"


def _show(book: Book, record: Written) -> str:
    return (
        f"=== {book.id} ({record.book_tokens:,} tokens), sample {record.sample}\n"
        f"--- written\n{record.said}\n--- reference\n{book.reference}"
    )
