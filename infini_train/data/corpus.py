"""Several datasets read as one: which document comes next. Imports no torch.

The order is a pure function of the datasets' lengths, the seed and how many documents were given out. Of several
datasets the one that is furthest behind its share of the tokens gives the next document.
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
class Part:
    """A dataset of a mixture.

    Attributes:
        name: as the config has it.
        dataset: its documents.
        weight: its share of the tokens, relative to the other parts'.
        epochs: passes over it, None for an endless stream. When they are done, the other parts share its place.
    """

    name: str
    dataset: Dataset
    weight: float = 1.0
    epochs: int | None = None


class Turn(NamedTuple):
    """How far a part has been given out: whole epochs, and documents of the running one."""

    epoch: int = 0
    cursor: int = 0


class _Order(NamedTuple):
    """Documents of a part in the order of an epoch, and the positions of those before each of them."""

    epoch: int
    documents: np.ndarray
    before: np.ndarray


class Corpus:
    """Documents of all parts, numbered through. A document of n tokens takes n + 1 positions of a lane.

    Args:
        parts: in the order of their documents' numbers; all of one tokenizer.
        seed: shuffles each part's documents, each epoch anew; None keeps their natural order.
        curriculum: lengths of the documents that come first, in each part's first epoch. A stage's tokens are divided
            among the parts by weight.

    Attributes:
        positions: int64, of each document.
        lengths_bytes: int64, bytes of each document's text.
        identity: the same for the same documents in the same order, the seed aside.

    Raises:
        ConfigError: two parts have other tokenizers, or are the same.
    """

    def __init__(self, parts: Sequence[Part], seed: int | None, curriculum: Sequence[LengthStage] = ()) -> None:
        _check_parts(parts)
        self.parts, self._seed, self._curriculum = tuple(parts), seed, tuple(curriculum)
        self.positions = np.concatenate([part.dataset.lengths_tokens for part in parts]) + 1
        self.lengths_bytes = np.concatenate([part.dataset.lengths_bytes for part in parts])
        self._first = np.cumsum([0, *(len(part.dataset) for part in parts)])  # number of each part's first document
        self._totals = [int(self._part_positions(i).sum()) for i in range(len(parts))]
        self._orders: dict[int, _Order] = {}  # of the epoch used last, by part
        self.identity = self._identify()

    @classmethod
    def of(cls, dataset: Dataset, seed: int | None, epochs: int | None = None) -> Self:
        """One dataset."""
        return cls([Part(str(dataset.folder), dataset, epochs=epochs)], seed)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def manifest(self) -> Manifest:
        """Of the first part; what it says of the tokenizer holds for all."""
        return self.parts[0].dataset.manifest

    @property
    def total_positions(self) -> float:
        """Of all epochs of all parts; infinite if one is endless."""
        return sum(
            float("inf") if part.epochs is None else part.epochs * total
            for part, total in zip(self.parts, self._totals, strict=True)
        )

    def start(self) -> tuple[Turn, ...]:
        """Before the first document."""
        return (Turn(),) * len(self.parts)

    def fits(self, turns: Sequence[Turn]) -> bool:
        """Whether these can be turns of this corpus."""
        return len(turns) == len(self.parts) and all(
            0 <= turn.cursor < len(part.dataset) for turn, part in zip(turns, self.parts, strict=True)
        )

    def take(self, turns: tuple[Turn, ...]) -> tuple[int | None, tuple[Turn, ...]]:
        """The next document (None: all epochs of all parts are done), and the turns behind it."""
        open_parts = [i for i, turn in enumerate(turns) if not self._is_done(i, turn)]
        if not open_parts:
            return None, turns
        chosen = min(open_parts, key=lambda i: (self.given_positions(i, turns[i]) / self.parts[i].weight, i))
        epoch, cursor = turns[chosen]
        document = int(self._first[chosen] + self._order(chosen, epoch).documents[cursor])
        done = cursor + 1 == len(self.parts[chosen].dataset)
        turn = Turn(epoch + 1, 0) if done else Turn(epoch, cursor + 1)
        return document, (*turns[:chosen], turn, *turns[chosen + 1 :])

    def has_ended(self, turns: Sequence[Turn]) -> bool:
        """Whether no document is left to take."""
        return all(self._is_done(i, turn) for i, turn in enumerate(turns))

    def given_positions(self, part: int, turn: Turn) -> int:
        """Positions that a part has given out so far."""
        return turn.epoch * self._totals[part] + (
            int(self._order(part, turn.epoch).before[turn.cursor]) if turn.cursor else 0
        )

    def locate(self, document: int) -> tuple[Dataset, int]:
        """The dataset of a document, and its number there."""
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.parts[part].dataset, document - int(self._first[part])

    def _is_done(self, part: int, turn: Turn) -> bool:
        epochs = self.parts[part].epochs
        return epochs is not None and turn.epoch >= epochs

    def _part_positions(self, part: int) -> np.ndarray:
        return self.positions[self._first[part] : self._first[part + 1]]

    def _order(self, part: int, epoch: int) -> _Order:
        order = self._orders.get(part)
        if order is None or order.epoch != epoch:
            positions = self._part_positions(part)
            documents = permute(len(positions), self._seed, epoch, part)
            if epoch == 0 and self._curriculum:
                share = self.parts[part].weight / sum(each.weight for each in self.parts)
                documents = bring_forward(documents, positions, self._curriculum, share)
            taken = positions[documents]
            order = self._orders[part] = _Order(epoch, documents, np.cumsum(taken) - taken)
        return order

    def _identify(self) -> str:
        if len(self.parts) == 1 and self.parts[0].epochs is None and not self._curriculum:
            return self.parts[0].dataset.identity
        words = [f"{part.dataset.identity} {part.weight!r} {part.epochs}" for part in self.parts]
        words += [f"{stage.tokens} {stage.max_document_tokens}" for stage in self._curriculum]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _check_parts(parts: Sequence[Part]) -> None:
    for number, part in enumerate(parts):
        if _tokenizer(part.dataset.manifest) != _tokenizer(parts[0].dataset.manifest):
            raise ConfigError(
                f"data.mixture: {part.name} was encoded with another tokenizer than {parts[0].name};"
                " encode all with the same one"
            )
        if any(part.dataset.identity == other.dataset.identity for other in parts[:number]):
            raise ConfigError(f"data.mixture: {part.name} is there twice; give it once, with a larger weight")


def _tokenizer(manifest: Manifest) -> tuple[str, int, int, int]:
    """What two datasets must have in common to be read as one."""
    return manifest.tokenizer.sha256, manifest.bos_id, manifest.eos_id, manifest.pad_id


def permute(documents: int, seed: int | None, epoch: int, part: int = 0) -> np.ndarray:
    """The order of an epoch: sorts raw random words, whose stream numpy keeps the same in all versions."""
    if seed is None:
        return np.arange(documents)
    key = [seed, epoch, part] if part else [seed, epoch]
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(documents), kind="stable")


def bring_forward(
    documents: np.ndarray, positions: np.ndarray, curriculum: Sequence[LengthStage], share: float
) -> np.ndarray:
    """The same documents, each once: first those that the stages ask for, then the rest, in the order they have.

    Args:
        documents: an order.
        positions: of each document, by its number.
        curriculum: each stage takes documents that fit until its tokens are reached, or there are no more.
        share: of the stages' tokens that is to come from here.
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
