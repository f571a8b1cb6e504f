"""Documents to lanes: rows of the global batch, each of which reads one document after another. Imports no torch.

Shapes: B lanes read by this rank, T window_tokens (the sequence length).

A document of n content tokens x1..xn takes n + 1 positions: inputs bos, x1..xn; labels x1..xn, eos. The corpus knows
which document comes next; the lane whose document ends first takes it, so what a lane reads depends neither on the
window nor on the number of processes.
"""

import heapq
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.corpus import Corpus, Turn
from infini_train.data.shards import CorruptDocumentError

IGNORED = -100  # label of a position without a loss
_FRESH, _ENDED = -1, -2  # a lane before its first document, and after its last


@dataclass(frozen=True)
class Batch:
    """One window of the lanes.

    Attributes:
        tokens_BT: int64 inputs.
        labels_BT: int64, already shifted; -100 where no loss is taken: padding, and all but the summary of a pair.
        starts_BT: bool, True at the first position of a document (and of the padding after the last one).
        weights_BT: float32 write weights, 1 for text and 0 for padding.
        document_B: int64, the document each lane ends in; -1 in padding.
        n_bytes: bytes of text that the valid labels stand for.
        loss_weights_BT: float32, weight of each label's loss; None: all equal.
    """

    tokens_BT: np.ndarray
    labels_BT: np.ndarray
    starts_BT: np.ndarray
    weights_BT: np.ndarray
    document_B: np.ndarray
    n_bytes: float
    loss_weights_BT: np.ndarray | None = None


@dataclass(frozen=True)
class LaneState:
    """Where the lanes of all ranks stand: enough to resume."""

    turns: tuple[Turn, ...]  # how much of each dataset has been taken
    document: tuple[int, ...]  # of each lane
    offset: tuple[int, ...]  # positions of that document read so far

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dumps."""
        return {name: list(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        turns = tree["turns"] if "turns" in tree else [(tree["epoch"], tree["cursor"])]  # older: a single dataset
        return cls(tuple(Turn(*turn) for turn in turns), tuple(tree["document"]), tuple(tree["offset"]))


class DocumentSpan(NamedTuple):
    """Positions [start, stop) of a document, at a column of a lane's window; document < 0 is padding."""

    lane: int
    column: int
    document: int
    start: int
    stop: int


class _SpanText(NamedTuple):
    """Inputs and the last label of a span: a slice of bos, x1..xn, eos. Loss is taken from position `loss_start` on."""

    ids: np.ndarray
    loss_start: int


class LaneReader:
    """Reads lanes of a corpus, window by window. Lanes that have run out of documents are padded.

    Args:
        corpus: what to read.
        n_lanes: lanes of the global batch.
        window_tokens: positions of a lane in one batch.
        rows: the lanes that this rank reads; default: all.
        on_corrupt: called with a message for each damaged document in `rows`, once.

    Attributes:
        corrupt_documents: damaged documents met so far (in `rows`); they are masked, so that no lane shifts.
    """

    adaptive = False  # what is read does not depend on the loss

    def __init__(
        self,
        corpus: Corpus,
        n_lanes: int,
        window_tokens: int,
        *,
        rows: slice | None = None,
        on_corrupt: Callable[[str], None] = lambda what: None,
    ) -> None:
        assert n_lanes > 0 and window_tokens > 0
        self.corpus = corpus
        self.n_lanes = n_lanes
        self.window_tokens = window_tokens
        self.rows = range(n_lanes)[rows if rows is not None else slice(None)]
        self._on_corrupt = on_corrupt
        self._corrupt: set[int] = set()

    @property
    def corrupt_documents(self) -> int:
        return len(self._corrupt)

    def observe_loss(self, state: LaneState, loss: float) -> LaneState:
        """The state itself."""
        return state

    def mix(self, state: LaneState) -> dict[str, float]:
        """Each dataset's epochs so far and its share of all positions, by name; nothing for a single dataset."""
        datasets = self.corpus.datasets
        if len(datasets) == 1:
            return {}
        taken = [self.corpus.taken_positions(i, turn) for i, turn in enumerate(state.turns)]
        found = {}
        for each, turn, positions in zip(datasets, state.turns, taken, strict=True):
            found[f"mix/{each.name}/share"] = positions / max(sum(taken), 1)
            found[f"mix/{each.name}/epochs"] = turn.epoch + turn.cursor / len(each.dataset)
        return found

    def start(self) -> LaneState:
        """The state before the first document."""
        return LaneState(self.corpus.start(), (_FRESH,) * self.n_lanes, (0,) * self.n_lanes)

    def parse(self, tree: Mapping[str, Any]) -> LaneState:
        """The state of a `LaneState.to_json`."""
        return LaneState.from_json(tree)

    def next(self, state: LaneState) -> tuple[Batch | None, LaneState]:
        """Next batch and following state; the same state gives the same batch, bit for bit.

        Returns:
            The batch (None once all lanes have ended) and the following state.

        Raises:
            ConfigError: the state belongs to another number of lanes or another dataset.
        """
        self._check(state)
        if self._has_ended(state):
            return None, state
        spans, after = self.plan(state)
        return self._read(spans, after), after

    def name_documents(self, state: LaneState) -> list[str]:
        """Names of the documents in the next batch, of all ranks' lanes."""
        numbers = sorted({span.document for span in self.plan(state)[0] if span.document >= 0})
        return [dataset.name(number) for dataset, number in map(self.corpus.locate, numbers)]

    def plan(self, state: LaneState) -> tuple[list[DocumentSpan], LaneState]:
        """What each lane reads in the next window, and the following state; from lengths alone."""
        window, turns = self.window_tokens, state.turns
        document, begin = list(state.document), [-offset for offset in state.offset]  # begin: column of position 0
        ends = [(begin[i] + self._positions(d), i) for i, d in enumerate(document) if d != _ENDED]
        spans = [DocumentSpan(i, 0, _ENDED, 1, 1 + window) for i, d in enumerate(document) if d == _ENDED]
        spans += [DocumentSpan(i, 0, document[i], -begin[i], min(end, window) - begin[i]) for end, i in ends if end > 0]
        heapq.heapify(ends)
        while ends and ends[0][0] < window:
            column, lane = heapq.heappop(ends)
            begin[lane] = column
            taken, turns = self.corpus.take(turns)
            if taken is None:
                document[lane] = _ENDED
                spans.append(DocumentSpan(lane, column, _ENDED, 0, window - column))
                continue
            document[lane] = taken
            end = column + self._positions(document[lane])
            spans.append(DocumentSpan(lane, column, document[lane], 0, min(end, window) - column))
            heapq.heappush(ends, (end, lane))
        offset = tuple(0 if d == _ENDED else window - b for d, b in zip(document, begin, strict=True))
        return spans, LaneState(turns, tuple(document), offset)

    def _check(self, state: LaneState) -> None:
        if len(state.document) != self.n_lanes or len(state.offset) != self.n_lanes:
            lanes = len(state.document)
            raise ConfigError(
                f"train.batch_lanes: the saved position has {lanes} lanes, not {self.n_lanes}; set it to {lanes}"
            )
        fits = all(
            d in (_FRESH, _ENDED) or (0 <= d < len(self.corpus) and 0 <= offset <= self._positions(d))
            for d, offset in zip(state.document, state.offset, strict=True)
        )
        if not fits or not self.corpus.fits(state.turns):
            names = ", ".join(each.name for each in self.corpus.datasets)
            raise ConfigError(f"data: the saved position does not fit {names}; give the data it was saved with")

    def _has_ended(self, state: LaneState) -> bool:
        if not self.corpus.has_ended(state.turns):
            return False
        return all(d == _ENDED or o == self._positions(d) for d, o in zip(state.document, state.offset, strict=True))

    def _positions(self, document: int) -> int:
        return int(self.corpus.positions[document]) if document >= 0 else 0

    def _read(self, spans: list[DocumentSpan], after: LaneState) -> Batch:
        """The tokens of the spans in this rank's rows."""
        shape = (len(self.rows), self.window_tokens)
        tokens_BT = np.full(shape, self.corpus.manifest.pad_id, np.int64)
        labels_BT = np.full(shape, IGNORED, np.int64)
        starts_BT = np.zeros(shape, bool)
        weights_BT = np.zeros(shape, np.float32)
        n_bytes = 0.0
        for lane, column, document, start, stop in sorted(span for span in spans if span.lane in self.rows):
            row = self.rows.index(lane)
            if start == 0:
                starts_BT[row, column] = True
            text = self._text(document, start, stop) if document >= 0 else None
            if text is None:
                continue
            columns = slice(column, column + stop - start)
            tokens_BT[row, columns], labels_BT[row, columns], weights_BT[row, columns] = text.ids[:-1], text.ids[1:], 1
            silent = min(max(text.loss_start - start, 0), stop - start)  # positions without loss
            labels_BT[row, column : column + silent] = IGNORED
            share = (stop - start - silent) / self._positions(document)
            n_bytes += share * int(self.corpus.lengths_bytes[document])
        document_B = np.array([max(after.document[lane], -1) for lane in self.rows], np.int64)
        return Batch(tokens_BT, labels_BT, starts_BT, weights_BT, document_B, n_bytes)

    def _text(self, document: int, start: int, stop: int) -> _SpanText | None:
        """Positions [start, stop) of a document; None if it is damaged."""
        manifest, n_tokens = self.corpus.manifest, self._positions(document) - 1
        dataset, number = self.corpus.locate(document)
        try:
            content = dataset.read(number, max(start - 1, 0), min(stop, n_tokens))
            loss_start = dataset.loss_start(number)
        except CorruptDocumentError as error:
            if document not in self._corrupt:
                self._on_corrupt(f"{error}; its {n_tokens:,} tokens are left out")
            self._corrupt.add(document)
            return None
        bos = [manifest.bos_id] if start == 0 else []
        eos = [manifest.eos_id] if stop == n_tokens + 1 else []
        ids = np.concatenate([np.array(bos, np.int64), content.astype(np.int64), np.array(eos, np.int64)])
        return _SpanText(ids, loss_start)


def prefetch(reader: Any, state: Any, depth: int = 2) -> Iterator[tuple[Batch, Any]]:
    """Batches of a reader, each with the following state, read ahead by a thread until the lanes end.

    An exception in the reader is raised here. Closing the generator stops the thread.
    """
    ready: queue.Queue[tuple[Batch, Any] | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: tuple[Batch, Any] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work(state: Any) -> None:
        try:
            while not stopped.is_set():
                batch, state = reader.next(state)
                offer(None if batch is None else (batch, state))
                if batch is None:
                    return
        except BaseException as error:  # noqa: BLE001 (raised again in the reading thread)
            offer(error)

    thread = threading.Thread(target=work, args=(state,), name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
