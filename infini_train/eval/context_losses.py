"""Losses of one document: by tokens since its start, and by how many of them the model may see. Imports torch late.

Each document streams through the model once, a few segments at a time, and its losses are summed by position. Then some
runs of its tokens, the targets, are scored again with nothing visible but the last c tokens before them: what is read
begins c tokens earlier, as a document of its own. The segment edges stay where they are in the whole document, so a
target's local context is the same for every c that reaches over its segment; what differs is what older tokens left in
the memory. Only one forward's tokens and the model's state are held, whatever the length.

Positions count as in training: of n tokens x1..xn there are n + 1, inputs bos, x1..xn, labels x1..xn, eos. The label of
position p has p tokens before it.

Legend: B lanes (targets), T tokens of a forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.lanes import IGNORED
from infini_train.data.shards import CorruptDocumentError, Dataset

if TYPE_CHECKING:
    from infini_train.model.transformer import ModelState, Transformer

FORWARD_TOKENS = 1024  # at least so many in a forward, however short the segment: a single lane fills no machine
FIRST_BUCKET_TOKENS = 64  # positions below this one; every later bucket is as long as all before it together


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """What is measured. A document's targets depend on the document, the seed and the plan, not on other documents."""

    contexts_tokens: tuple[int, ...] = (256, 1024, 4096)  # visible before a target
    targets: int = 8  # of a document that is long enough
    target_tokens: int = 64  # scored of each
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts_tokens or min(self.contexts_tokens) <= 0:
            raise ConfigError("--contexts: give at least one, each positive")
        if len(set(self.contexts_tokens)) < len(self.contexts_tokens):
            raise ConfigError("--contexts: the same one is given twice")
        for name in ("targets", "target_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be positive")
        if self.seed < 0:
            raise ConfigError("--seed: must not be negative")

    def place_targets(self, document: int, tokens: int) -> list[int]:
        """First positions of a document's targets: one in each of even stretches after the largest context.

        Args:
            document: its number.
            tokens: of its text.
        """
        first, last = max(self.contexts_tokens), tokens + 1 - self.target_tokens
        if last < first:
            return []
        share = np.random.default_rng([self.seed, document]).random(self.targets)
        places = first + (np.arange(self.targets) + share) / self.targets * (last + 1 - first)
        return sorted({int(place) for place in places})


@dataclass(frozen=True, kw_only=True)
class DocumentLosses:
    """Losses of one document, as sums in nats."""

    document: int
    name: str
    tokens: int
    bucket_tokens: list[int] = field(default_factory=list)  # labels in each bucket of positions
    bucket_losses: list[float] = field(default_factory=list)
    target_positions: list[int] = field(default_factory=list)
    target_losses: list[list[float]] = field(default_factory=list)  # of each target: by context, then with all of it
    peak_memory_bytes: int = 0
    is_damaged: bool = False


def bucket_edges(tokens: int) -> list[int]:
    """First positions of the buckets of a text of `tokens` tokens, and the end of the last: 0, 64, 128, 256, ..."""
    edges = [0, FIRST_BUCKET_TOKENS]
    while edges[-1] < tokens + 1:
        edges.append(2 * edges[-1])
    return edges


def measure_document(
    model: "Transformer",
    dataset: Dataset,
    document: int,
    plan: ContextPlan,
    *,
    window_tokens: int | None = None,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> DocumentLosses:
    """Losses of one document, by position and by context.

    Args:
        model: any variant, on its device.
        dataset: of the model's tokenizer.
        document: its number.
        plan: which contexts and targets.
        window_tokens: of a forward, a multiple of the segment; default: a few segments, at least some 1,000 tokens.
        on_progress: called with the tokens read.
    """
    from infini_train.inference.reading import FORWARD_SEGMENTS, segment_of
    from infini_train.parallel import device

    tokens, name = int(dataset.lengths_tokens[document]), dataset.name(document)
    text = _Text(dataset, document, tokens)
    segment = segment_of(model)
    chunk = window_tokens or max(FORWARD_SEGMENTS, FORWARD_TOKENS // segment) * segment
    targets = plan.place_targets(document, tokens)
    whole = np.zeros(len(targets))
    edges = np.array(bucket_edges(tokens))
    counts, sums = np.zeros(len(edges) - 1, np.int64), np.zeros(len(edges) - 1)
    try:
        state: ModelState | None = None
        for begin in range(0, tokens + 1, chunk):
            stop = min(begin + chunk, tokens + 1)
            loss_BT, state = _score(model, [_Cut(text, 0, begin, stop)], state)
            bucket = np.searchsorted(edges, np.arange(begin, stop), side="right") - 1
            counts += np.bincount(bucket, minlength=len(counts))
            sums += np.bincount(bucket, loss_BT[0], minlength=len(counts))
            for i, target in enumerate(targets):
                first, last = max(target - begin, 0), min(target + plan.target_tokens - begin, stop - begin)
                whole[i] += loss_BT[0, first:last].sum() if first < last else 0.0
            on_progress(stop - begin)
        by_context = [_score_targets(model, text, targets, c, plan, chunk, on_progress) for c in plan.contexts_tokens]
    except CorruptDocumentError:
        return DocumentLosses(document=document, name=name, tokens=tokens, is_damaged=True)
    filled = int(counts.nonzero()[0][-1]) + 1
    return DocumentLosses(
        document=document,
        name=name,
        tokens=tokens,
        bucket_tokens=counts[:filled].tolist(),
        bucket_losses=sums[:filled].tolist(),
        target_positions=targets,
        target_losses=np.stack([*by_context, whole], axis=1).tolist(),
        peak_memory_bytes=device.peak_memory_bytes(),
    )


@dataclass(frozen=True)
class _Text:
    """Inputs and labels of a document at any positions."""

    dataset: Dataset
    document: int
    tokens: int

    def ids(self, start: int, stop: int) -> np.ndarray:
        """int64: bos at 0, x1..xn, eos at n + 1; [start, stop)."""
        manifest = self.dataset.manifest
        content = self.dataset.read(self.document, max(start - 1, 0), min(stop - 1, self.tokens)).astype(np.int64)
        bos, eos = [manifest.bos_id] * (start == 0), [manifest.eos_id] * (stop == self.tokens + 2)
        return np.concatenate((np.array(bos, np.int64), content, np.array(eos, np.int64)))


@dataclass(frozen=True)
class _Cut:
    """Positions [begin, stop) of a text, of which nothing before `start` is visible, in one lane of a forward."""

    text: _Text
    start: int
    begin: int
    stop: int


def _score(model: "Transformer", cuts: Sequence[_Cut], state: "ModelState | None") -> tuple[np.ndarray, "ModelState"]:
    """Losses (B, T) of cuts of the same length, one a lane, float64; positions outside the text have none."""
    from infini_train.inference.reading import score_positions

    shape = (len(cuts), cuts[0].stop - cuts[0].begin)
    tokens_BT, labels_BT = np.full(shape, cuts[0].text.dataset.manifest.pad_id, np.int64), np.full(shape, IGNORED)
    starts_BT, weights_BT = np.zeros(shape, bool), np.zeros(shape, np.float32)
    starts_BT[:, 0] = state is None  # before a start there is only padding
    for lane, cut in enumerate(cuts):
        assert cut.stop - cut.begin == shape[1]
        first, last = max(cut.start, cut.begin), min(cut.stop, cut.text.tokens + 1)
        if first >= last:
            continue
        ids, columns = cut.text.ids(first, last + 1), slice(first - cut.begin, last - cut.begin)
        tokens_BT[lane, columns], labels_BT[lane, columns], weights_BT[lane, columns] = ids[:-1], ids[1:], 1
        if first == cut.start:
            starts_BT[lane, columns.start] = True
            tokens_BT[lane, columns.start] = cut.text.dataset.manifest.bos_id
    return score_positions(model, tokens_BT, labels_BT, starts_BT, weights_BT, state)


def _score_targets(
    model: "Transformer",
    text: _Text,
    targets: Sequence[int],
    context_tokens: int,
    plan: ContextPlan,
    chunk: int,
    on_progress: Callable[[int], object],
) -> np.ndarray:
    """Loss of each target, summed over its tokens, with `context_tokens` visible before it; targets side by side."""
    segment = model.config.segment_tokens or 1
    found = np.zeros(len(targets))
    starts = [target - context_tokens for target in targets]
    begins = [start // segment * segment for start in starts]  # an edge of the whole document's segments
    ends = [target + plan.target_tokens for target in targets]
    longest = max((end - begin for begin, end in zip(begins, ends, strict=True)), default=0)
    state: ModelState | None = None
    for offset in range(0, longest, chunk):
        width = min(chunk, longest - offset)
        cuts = [
            _Cut(text, start, begin + offset, begin + offset + width)
            for start, begin in zip(starts, begins, strict=True)
        ]
        loss_BT, state = _score(model, cuts, state)
        for lane, (cut, target, end) in enumerate(zip(cuts, targets, ends, strict=True)):
            first, last = max(target - cut.begin, 0), min(end - cut.begin, width)
            found[lane] += loss_BT[lane, first:last].sum() if first < last else 0.0
        on_progress(len(cuts) * width)
    return found
