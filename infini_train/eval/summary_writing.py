"""Writes summaries of whole books: each is read to its end in constant memory, then the model writes.

Books of a batch are read side by side, a lane each; the summaries are written one after the other. Imports torch late.
"""

import dataclasses
import gzip
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.pairs import PairForm
from infini_train.data.tokenizer import Tokenizer
from infini_train.inference.sampling import Sampling
from infini_train.regular_files import require_regular

if TYPE_CHECKING:
    from infini_train.inference.reading import Tail
    from infini_train.model.transformer import Transformer

PAPER = Sampling(temperature=0.5, top_p=0.95)  # of arXiv 2404.07143
MAX_NEW_TOKENS = 1024  # there as well
BOOK_FIELDS = ("book", "text")  # the first that is there
_MAX_LINE_BYTES = 500_000_000  # of the file as it is unpacked; a longer book fits no memory


class Book(NamedTuple):
    """A book of the test, by its place in the file."""

    number: int
    id: str
    text: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """A summary that the model wrote."""

    number: int  # of the book
    sample: int  # of several summaries of one book
    id: str
    book_tokens: int  # read before it
    said: str
    said_tokens: int
    ended: bool  # by the end of the document, not by the limit
    read_s: float  # of the book, in a batch of `lanes` books
    write_s: float
    lanes: int
    peak_memory_bytes: int  # of the process, when it was there


@dataclass(frozen=True, kw_only=True)
class SummaryTask:
    """What is asked for."""

    data: Path
    sampling: Sampling = PAPER
    max_new_tokens: int = MAX_NEW_TOKENS
    samples: int = 1  # of each book
    books: int | None = None  # the first ones; None: all
    max_book_tokens: int | None = None  # longer books are cut at their end, prompt and separator included
    form: PairForm = PairForm()
    book_field: str | None = None
    summary_field: str = "summary"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "books", "max_book_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be positive")

    def settings(self) -> dict[str, Any]:
        """What the summaries depend on, besides the checkpoint."""
        data = hashlib.sha256()
        with open_text(self.data) as stream:
            for line in _lines(stream, self.data):
                data.update(line)
        return {
            "data_sha256": data.hexdigest(),
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "seed": self.sampling.seed,
            "max_new_tokens": self.max_new_tokens,
            "max_book_tokens": self.max_book_tokens,
            "prompt": self.form.prompt,
            "separator": self.form.separator,
        }

    def read_books(self) -> Iterator[Book]:
        """The books of the file, one after the other.

        Raises:
            ConfigError: it can't be read, or a line is no pair; the message names it.
        """
        found = -1
        with open_text(self.data) as stream:
            for line in islice(_lines(stream, self.data), self.books):
                found += 1
                yield self._parse(found, line)
        if found < 0:
            raise ConfigError(f"--data: {self.data} holds no books")

    def _parse(self, number: int, line: bytes) -> Book:
        where = f"--data: {self.data}, record {number + 1}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: is not a JSON object")
        field = self.book_field or next((name for name in BOOK_FIELDS if name in row), BOOK_FIELDS[0])
        for name, option in ((field, "--text-field"), (self.summary_field, "--summary-field")):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ConfigError(f"{where}: no text in field {name!r}; the fields are {', '.join(row)}; see {option}")
            try:
                row[name].encode("utf-8")
            except UnicodeEncodeError as error:
                problem = f"character {error.start} of field {name!r} is half a surrogate pair"
                raise ConfigError(f"{where}: {problem}; repair it") from error
        name = str(row.get("id", number)).encode("utf-8", "backslashreplace").decode()
        return Book(number, name, row[field], row[self.summary_field])


def _lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines that are not empty."""
    try:
        while line := stream.readline(_MAX_LINE_BYTES + 1):
            if len(line) > _MAX_LINE_BYTES:
                raise ConfigError(f"--data: {path} has a line of more than {_MAX_LINE_BYTES / 1e6:,.0f} MB; cut it")
            if line.strip():
                yield line
    except (OSError, EOFError, zlib.error) as error:  # of gzip, mostly
        raise ConfigError(f"--data: {path} can't be read on: {error}; copy it again") from error


def open_text(path: Path) -> Any:
    """A file opened for reading bytes, unpacked if its name ends in .gz.

    Raises:
        ConfigError: it can't be.
    """
    try:
        require_regular(path)  # it is read twice, which no pipe allows
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise ConfigError(f"--data: {path} can't be read: {error.strerror}") from error


def write_summaries(
    model: "Transformer",
    tokenizer: Tokenizer,
    task: SummaryTask,
    *,
    lanes: int,
    done: Collection[tuple[int, int]] = (),
    end_ids: Collection[int] = (),
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> Iterator[list[Written]]:
    """Summaries of the books of a task, a batch of books at a time, in the order of the file.

    Args:
        model: any variant; memory stays constant where its state does.
        tokenizer: of the model.
        task: which books, and how.
        lanes: books read side by side; what is written does not depend on it, rounding aside.
        done: (book, sample) to leave out.
        end_ids: ids that end a summary; none: the tokenizer's eos.
        on_progress: called with tokens read.
    """
    from infini_train.inference.reading import read_segments
    from infini_train.parallel import device

    stops = end_ids or (tokenizer.eos_id,)
    open_books = (book for book in task.read_books() if _samples_left(task, book, done))
    while batch := list(islice(open_books, lanes)):
        ids = (task.form.encode_book(tokenizer, book.text, task.max_book_tokens) for book in batch)
        texts = [np.append(tokenizer.bos_id, each).astype(np.int64) for each in ids]
        clock = time.perf_counter()
        tails = read_segments(model, texts, on_progress)
        device.synchronise()
        read_s = time.perf_counter() - clock
        written = []
        for book, text, tail in zip(batch, texts, tails, strict=True):
            for sample in _samples_left(task, book, done):
                clock = time.perf_counter()
                said = _write(model, stops, task, tail, _own_stream(task.sampling, book.number, sample))
                written.append(
                    Written(
                        number=book.number,
                        sample=sample,
                        id=book.id,
                        book_tokens=len(text),
                        said=tokenizer.decode(said).strip(),
                        said_tokens=len(said),
                        ended=len(said) < task.max_new_tokens,
                        read_s=read_s,
                        write_s=time.perf_counter() - clock,
                        lanes=len(batch),
                        peak_memory_bytes=device.peak_memory_bytes(),
                    )
                )
        yield written


def _write(
    model: "Transformer", stops: Collection[int], task: SummaryTask, tail: "Tail", sampling: Sampling
) -> list[int]:
    """Ids of a summary, without the one that may end it."""
    from infini_train.inference.generation import continue_from

    prompt, limit = tail.tokens.tolist(), task.max_new_tokens
    return list(continue_from(model, prompt, tail.state, max_new_tokens=limit, stop_id=stops, sampling=sampling))


def _samples_left(task: SummaryTask, book: Book, done: Collection[tuple[int, int]]) -> Sequence[int]:
    return [sample for sample in range(task.samples) if (book.number, sample) not in done]


def _own_stream(sampling: Sampling, number: int, sample: int) -> Sampling:
    """The same settings with a seed that no other summary has."""
    seed = int(np.random.SeedSequence([sampling.seed, number, sample]).generate_state(1)[0])
    return dataclasses.replace(sampling, seed=seed)
