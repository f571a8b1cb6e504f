"""Several datasets read as one: which document comes next. Imports no torch.

The order is a pure function of the datasets' lengths, the seed and how many documents have been taken. The next
document comes from the dataset that lags furthest behind its share of the tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from infini_train.config.data import LengthStage
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import Manifest
from infini_train.data.shards import Dataset


@dataclass(frozen=True)
class WeightedDataset:
    """A dataset of a mixture.

    Attributes:
        name: as the config has it.
        dataset: its documents.
        weight: its share of the tokens, relative to the weights of the others.
        epochs: passes over it; None: endless. When they are done, the other datasets share its place.
    """

    name: str
    dataset: Dataset
    weight: float = 1.0
    epochs: int | None = None


class Turn(NamedTuple):
    """How much of a dataset has been taken: whole epochs, and documents of the current one."""

    epoch: int = 0
    cursor: int = 0


class _Order(NamedTuple):
    """The order of a dataset's documents in an epoch."""

    epoch: int
    documents: np.ndarray  # int64, their numbers in the dataset
    before: np.ndarray  # int64, positions of all documents before each of them


class Corpus:
    """Documents of all datasets, numbered consecutively. A document of n tokens takes n + 1 positions of a lane.

    Args:
        datasets: in the order of their documents' numbers, all encoded with one tokenizer.
        seed: shuffles each dataset's documents, differently in each epoch; None keeps their natural order.
        curriculum: lengths of the documents that come first, in each dataset's first epoch. A stage's tokens are
            divided among the datasets by weight.

    Attributes:
        positions: int64, positions of each document.
        lengths_bytes: int64, bytes of each document's text.
        identity: equal for the same documents in the same order, the seed aside.
        earlier_identity: what earlier versions had for it: without special ids, index and pairs.

    Raises:
        ConfigError: two datasets have different tokenizers, or are the same.
    """

    def __init__(
        self, datasets: Sequence[WeightedDataset], seed: int | None, curriculum: Sequence[LengthStage] = ()
    ) -> None:
        _check_datasets(datasets)
        self.datasets, self._seed, self._curriculum = tuple(datasets), seed, tuple(curriculum)
        self.positions = np.concatenate([each.dataset.lengths_tokens for each in datasets]) + 1
        self.lengths_bytes = np.concatenate([each.dataset.lengths_bytes for each in datasets])
        self._first = np.cumsum([0, *(len(each.dataset) for each in datasets)])  # number of each one's first document
        self._totals = [int(self._positions_of(i).sum()) for i in range(len(datasets))]
        self._orders: dict[int, _Order] = {}  # of the epoch used last, by dataset
        self.identity = self._identify([each.dataset.manifest.identity for each in datasets])
        self.earlier_identity = self._identify([each.dataset.manifest.documents_sha256 for each in datasets])

    @classmethod
    def of(cls, dataset: Dataset, seed: int | None, epochs: int | None = None) -> Self:
        """A corpus of one dataset."""
        return cls([WeightedDataset(str(dataset.folder), dataset, epochs=epochs)], seed)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def manifest(self) -> Manifest:
        """The first dataset's manifest; what it says about the tokenizer holds for all."""
        return self.datasets[0].dataset.manifest

    @property
    def total_positions(self) -> float:
        """Positions of all epochs of all datasets; infinite if one is endless."""
        return sum(
            float("inf") if each.epochs is None else each.epochs * total
            for each, total in zip(self.datasets, self._totals, strict=True)
        )

    def start(self) -> tuple[Turn, ...]:
        """Turns before the first document."""
        return (Turn(),) * len(self.datasets)

    def fits(self, turns: Sequence[Turn]) -> bool:
        """Whether these can be turns of this corpus."""
        return len(turns) == len(self.datasets) and all(
            0 <= turn.cursor < len(each.dataset) for turn, each in zip(turns, self.datasets, strict=True)
        )

    def take(self, turns: tuple[Turn, ...]) -> tuple[int | None, tuple[Turn, ...]]:
        """Next document (None: all epochs of all datasets are done) and following turns."""
        unfinished = [i for i, turn in enumerate(turns) if not self._is_done(i, turn)]
        if not unfinished:
            return None, turns
        chosen = min(unfinished, key=lambda i: (self.taken_positions(i, turns[i]) / self.datasets[i].weight, i))
        epoch, cursor = turns[chosen]
        document = int(self._first[chosen] + self._order(chosen, epoch).documents[cursor])
        done = cursor + 1 == len(self.datasets[chosen].dataset)
        turn = Turn(epoch + 1, 0) if done else Turn(epoch, cursor + 1)
        return document, (*turns[:chosen], turn, *turns[chosen + 1 :])

    def has_ended(self, turns: Sequence[Turn]) -> bool:
        """Whether no document is left to take."""
        return all(self._is_done(i, turn) for i, turn in enumerate(turns))

    def taken_positions(self, number: int, turn: Turn) -> int:
        """Positions taken from a dataset so far."""
        return turn.epoch * self._totals[number] + (
            int(self._order(number, turn.epoch).before[turn.cursor]) if turn.cursor else 0
        )

    def locate(self, document: int) -> tuple[Dataset, int]:
        """The dataset of a document, and its number there."""
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.datasets[number].dataset, document - int(self._first[number])

    def _is_done(self, number: int, turn: Turn) -> bool:
        epochs = self.datasets[number].epochs
        return epochs is not None and turn.epoch >= epochs

    def _positions_of(self, number: int) -> np.ndarray:
        """Positions of each document of a dataset."""
        return self.positions[self._first[number] : self._first[number + 1]]

    def _order(self, number: int, epoch: int) -> _Order:
        order = self._orders.get(number)
        if order is None or order.epoch != epoch:
            positions = self._positions_of(number)
            documents = permute(len(positions), self._seed, epoch, number)
            if epoch == 0 and self._curriculum:
                share = self.datasets[number].weight / sum(each.weight for each in self.datasets)
                documents = bring_forward(documents, positions, self._curriculum, share)
            ordered = positions[documents]
            order = self._orders[number] = _Order(epoch, documents, np.cumsum(ordered) - ordered)
        return order

    def _identify(self, identities: Sequence[str]) -> str:
        """One for all, from one of each dataset."""
        if len(self.datasets) == 1 and self.datasets[0].epochs is None and not self._curriculum:
            return identities[0]
        lines = [f"{own} {each.weight!r} {each.epochs}" for own, each in zip(identities, self.datasets, strict=True)]
        lines += [f"{stage.tokens} {stage.max_document_tokens}" for stage in self._curriculum]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_datasets(datasets: Sequence[WeightedDataset]) -> None:
    for number, each in enumerate(datasets):
        if _tokenizer(each.dataset.manifest) != _tokenizer(datasets[0].dataset.manifest):
            raise ConfigError(
                f"{each.name} was encoded with another tokenizer than {datasets[0].name}; encode all with the same one"
            )
        if any(each.dataset.identity == other.dataset.identity for other in datasets[:number]):
            raise ConfigError(f"{each.name} is there twice; give it once, with a larger weight")


def _tokenizer(manifest: Manifest) -> tuple[str, int, int, int]:
    """What two datasets must have in common to be read as one."""
    return manifest.tokenizer.sha256, manifest.bos_id, manifest.eos_id, manifest.pad_id


def permute(documents: int, seed: int | None, epoch: int, dataset: int = 0) -> np.ndarray:
    """The order of a dataset's documents in an epoch, int64; without a seed the natural order.

    Sorts raw random words, whose stream numpy keeps the same in all versions.
    """
    if seed is None:
        return np.arange(documents)
    key = [seed, epoch, dataset] if dataset else [seed, epoch]
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(documents), kind="stable")


def bring_forward(
    documents: np.ndarray, positions: np.ndarray, curriculum: Sequence[LengthStage], share: float
) -> np.ndarray:
    """The same documents, each once: those of the stages first, then the rest, each group in the given order.

    Args:
        documents: int64, an order.
        positions: int64, positions of each document, by its number.
        curriculum: each stage takes documents that fit until its tokens are reached, or there are no more.
        share: fraction of the stages' tokens to take from this dataset.
    """
    taken, rest = [], documents
    for stage in curriculum:
        sizes = positions[rest]
        fits = sizes <= stage.max_document_tokens + 1
        before = np.cumsum(np.where(fits, sizes, 0)) - sizes
        chosen = fits & (before < stage.tokens * share)
        taken.append(rest[chosen])
        rest = rest[~chosen]
    return np.concatenate([*taken, rest])
