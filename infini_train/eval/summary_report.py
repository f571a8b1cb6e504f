"""A test of summaries from its settings to files: summaries as they come, then scores, texts to read, scalars."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from infini_train.eval.loading import Trained
from infini_train.eval.records import RecordFile, find_home, hash_checkpoint, write_file
from infini_train.eval.rouge import MEASURES, lead, make_scorer, summarise_scores
from infini_train.eval.summaries import Book, SummaryTask, Written, write_summaries

RECORDS, RESULTS, TEXTS = "summaries.jsonl", "results.json", "summaries.txt"
SHOWN = 5  # summaries in TensorBoard
Scorer = Callable[[str, str], dict[str, float]]


def evaluate_summaries(
    trained: Trained,
    task: SummaryTask,
    *,
    lanes: int,
    out: Path | None = None,
    overwrite: bool = False,
    precision: str = "fp32",
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Writes the summaries that are still missing, scores all, writes everything, and returns the results.

    Args:
        trained: the model, in `precision`.
        task: which books, and how.
        lanes: books read side by side.
        out: folder for everything; default: eval/ of the run's folder, and its tensorboard/eval/.
        overwrite: drop the summaries that are there.
        precision: of weights and activations.
        say: told a line for every batch of books that is done.

    Raises:
        ConfigError: the data can't be read, rouge-score is not installed, or `out` holds another test.
    """
    scorer, home = make_scorer(), find_home(trained.checkpoint)
    folder = out or home / "eval" / f"summarise-{trained.step}-{task.data.name.split('.')[0]}"
    settings = {
        "checkpoint_sha256": hash_checkpoint(trained.checkpoint),
        **task.settings(),
        "precision": precision,
    }
    file = RecordFile(folder / RECORDS, Written, settings, overwrite=overwrite)
    _write_rest(trained, task, file, lanes, say)
    books = _read_short(task)
    found = [record for record in file.records if record.number < len(books) and record.sample < task.samples]
    results = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        **settings,
        "samples": task.samples,
        "folder": str(folder),
        **score(books, found, scorer),
    }
    write_file(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    write_file(folder / TEXTS, "\n\n".join(_show(books[record.number], record) for record in found) + "\n")
    _write_board((out or home) / "tensorboard" / "eval", folder.name, trained.step, results, books, found)
    return results


def _write_rest(
    trained: Trained, task: SummaryTask, file: RecordFile[Written], lanes: int, say: Callable[[str], object]
) -> None:
    done = {(record.number, record.sample) for record in file.records}
    if done:
        say(f"{len(done)} summaries were there already")
    with tqdm(unit="tok", unit_scale=True, leave=False, disable=None, dynamic_ncols=True) as bar:
        batches = write_summaries(
            trained.model, trained.tokenizer, task, lanes=lanes, done=done, on_progress=bar.update
        )
        for written in batches:
            file.append(written)
            first, last = written[0].number + 1, written[-1].number + 1
            tokens = sum({record.number: record.book_tokens for record in written}.values())
            with bar.external_write_mode():
                say(
                    f"books {first} to {last}: {tokens:,} tokens read in {written[0].read_s:,.1f} s,"
                    f" {sum(record.said_tokens for record in written):,} written in"
                    f" {sum(record.write_s for record in written):,.1f} s"
                )


def _read_short(task: SummaryTask) -> list[Book]:
    """The books with their first three sentences for a text, so that a test of any size fits into memory."""
    return [book._replace(text=lead(book.text)) for book in task.read_books()]


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


def _write_board(
    folder: Path, name: str, step: int, results: dict[str, Any], books: Sequence[Book], written: Sequence[Written]
) -> None:
    # A folder of its own: TensorBoard follows only the newest file of a folder, and training may still be writing.
    with SummaryWriter(str(folder)) as board:
        for key in (*MEASURES, "overall"):
            board.add_scalar(f"eval/{name}/{key}", results["model"][key], step)
        for record in written[:SHOWN]:
            text = _show(books[record.number], record).replace("\n", "  \n")
            board.add_text(f"eval/{name}/{record.id}", text, step)
