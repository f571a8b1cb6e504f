"""`infini-train eval summarise`: summaries of whole books, scored by ROUGE. Imports torch late.

Legend: N books, M measures.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infini_train.command_line import describe, path, positive
from infini_train.data.pairs import SEPARATOR, PairForm
from infini_train.data.words import has_unspaced_words
from infini_train.eval.measurement import Measurement, add_lanes, add_model, add_out, run
from infini_train.eval.rouge import MEASURES, Scorer, lead, make_scorer
from infini_train.eval.summary_writing import MAX_NEW_TOKENS, PAPER, Book, SummaryTask, Written, write_summaries
from infini_train.inference.prompts import check_text
from infini_train.inference.sampling import add_sampling, read_sampling
from infini_train.statistics import bootstrap_rows, percentile_interval

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from infini_train.inference.loading import Trained

TEXTS = "summaries.txt"
SHOWN = 5  # summaries in TensorBoard
_CHARACTERS = (
    "words of scripts without spaces between them: single characters, so these scores compare only with their like"
)
EXAMPLES = """\
examples:
  infini-train eval summarise runs/summarise_8b --data booksum/test.jsonl
  infini-train eval summarise runs/stories --data runs/stories/test.jsonl --lanes 8 --samples 3 --seed 1
  infini-train eval summarise runs/stories --data runs/stories/test.jsonl --max-book-tokens 4096 --out short

Stopped by Ctrl-C? The same command resumes with the next books. More books or samples add to what is there.
"""


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

    def __init__(self, trained: "Trained", task: SummaryTask, *, lanes: int) -> None:
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
        return [f"{len(records)} summaries were there already"] if records else [], None

    def measure(self, records: Sequence[Written], on_progress: Callable[[int], object]) -> Iterator[Sequence[Written]]:
        done = {(record.number, record.sample) for record in records}
        model, tokenizer = self.trained.model, self.trained.tokenizer
        return write_summaries(
            model,
            tokenizer,
            self.task,
            lanes=self.lanes,
            done=done,
            end_ids=self.trained.end_ids,
            on_progress=on_progress,
        )

    def describe(self, batch: Sequence[Written], records: Sequence[Written]) -> Iterator[str]:
        first, last = batch[0].number + 1, batch[-1].number + 1
        tokens = sum({record.number: record.book_tokens for record in batch}.values())
        yield (
            f"books {first} to {last}: {tokens:,} tokens read in {batch[0].read_s:,.1f} s,"
            f" {sum(record.said_tokens for record in batch):,} written in"
            f" {sum(record.write_s for record in batch):,.1f} s"
        )

    def summarise(self, records: Sequence[Written]) -> dict[str, Any]:
        return score(self.books, self.own(records), self.scorer)

    def write(self, records: Sequence[Written], results: dict[str, Any], folder: Path, board: "SummaryWriter") -> None:
        from infini_train.atomic_files import write_atomic

        found, step = self.own(records), self.trained.step
        texts = [_show(self.books[record.number], record) for record in found]
        write_atomic(folder / TEXTS, "\n\n".join(texts) + "\n")
        for key in (*MEASURES, "overall"):
            board.add_scalar(f"eval/{folder.name}/{key}", results["model"][key], step)
        for record, text in zip(found[:SHOWN], texts, strict=False):
            board.add_text(f"eval/{folder.name}/{record.id}", text.replace("\n", "  \n"), step)

    def format(self, results: dict[str, Any]) -> str:
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
            f"{results['said_tokens']:.0f} tokens a summary, {100 * results['ended']:.0f} % of them ended by"
            f" themselves; {results['read_tokens_per_s']:,.0f} tokens/s read, peak memory"
            f" {results['peak_memory_mb']:,.0f} MB",
            "lead-3: the book's first three sentences; random: another book's reference",
            *([_CHARACTERS] if any(has_unspaced_words(book.reference) for book in self.books) else []),
            f"written to {results['folder']}",
        ]
        return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- scores


def summarise_scores(scores_NM: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Means of the measures and their geometric mean (the "overall" of arXiv 2404.07143), in percent.

    95 % intervals by bootstrap over books, always with the same draws. A single book says nothing beyond itself.
    """
    values_NM = 100 * np.asarray(scores_NM, np.float64)
    books = len(values_NM)
    assert books and values_NM.shape[1] == len(MEASURES)
    means, drawn = values_NM.mean(0), values_NM[bootstrap_rows(books)].mean(1)
    found: dict[str, Any] = {"books": books}
    for column, name in enumerate(MEASURES):
        found[name] = float(means[column])
        found[f"{name}_95"] = list(percentile_interval(drawn[:, column]))
    found["overall"] = _geometric_mean(means)
    found["overall_95"] = list(percentile_interval([_geometric_mean(row) for row in drawn]))
    return found


def _geometric_mean(values: np.ndarray) -> float:
    return float(math.prod(values.tolist()) ** (1 / len(values)))


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


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} ({interval[0]:.1f}-{interval[1]:.1f})"


def _show(book: Book, record: Written) -> str:
    return (
        f"=== {book.id} ({record.book_tokens:,} tokens), sample {record.sample}\n"
        f"--- written\n{record.said}\n--- reference\n{book.reference}"
    )


# ------------------------------------------------------------------------------------------------------------- command


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval summarise` its options."""
    description = (
        "Read each book to its end in constant memory, let the model write a summary, and compare it with the"
        " reference: ROUGE-1, -2, -L and their geometric mean, with intervals, beside two trivial summaries."
        " The defaults are the paper's settings."
    )
    describe(parser, description, EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--data", type=path, required=True, metavar="FILE", help="JSON lines of book (or text) and summary; .gz too"
    )
    parser.add_argument("--text-field", metavar="NAME", help="field of the book (default: book, else text)")
    parser.add_argument(
        "--summary-field", default="summary", metavar="NAME", help="field of the reference (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="text before the book, as in training (default: none)"
    )
    parser.add_argument(
        "--separator",
        default=SEPARATOR,
        metavar="TEXT",
        help="text before the summary, as in training (default: Summary:)",
    )
    parser.add_argument("--books", type=positive, metavar="N", help="read only the first N books (default: all)")
    parser.add_argument(
        "--max-book-tokens", type=positive, metavar="N", help="cut longer books at their end (default: none is cut)"
    )
    parser.add_argument(
        "--samples", type=positive, default=1, metavar="N", help="number of summaries per book (default: %(default)s)"
    )
    add_sampling(parser, max_new_tokens=MAX_NEW_TOKENS, temperature=PAPER.temperature, top_p=PAPER.top_p)
    add_lanes(parser, "books")
    add_out(parser, "eval/summarise-STEP-FILE", "the summaries that are there")
    parser.set_defaults(command=_summarise)


def _summarise(options: argparse.Namespace) -> None:
    task = SummaryTask(
        data=options.data,
        sampling=read_sampling(options),
        max_new_tokens=options.max_new_tokens,
        samples=options.samples,
        books=options.books,
        max_book_tokens=options.max_book_tokens,
        form=PairForm(
            prompt=check_text(options.prompt, "--prompt"), separator=check_text(options.separator, "--separator")
        ),
        book_field=options.text_field,
        summary_field=options.summary_field,
    )
    run(options, lambda trained: SummaryTest(trained, task, lanes=options.lanes))
