"""Windows of synthetic texts: a pure function of seed, step and lane, and of how well earlier texts were learned.

A window holds one text or several short ones, each starting at a segment's edge, so that gradients reach from an answer
back to what it asks for. The maker decides what a text is and what its size counts. Difficulty follows the loss: texts
become harder once (if the maker has harder ones), then grow. Imports no torch.

Shapes: B lanes read by this rank, T window_tokens (the sequence length).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from infini_train.data.lanes import IGNORED, Batch

START_LOSS, LOSS_DECAY = 10.0, 0.9  # of the running mean of the loss
GROWTH_FACTOR, GROWTH_STEP = 1.05, 0.1  # each step at a low loss multiplies the largest size and adds to it
# The names under which checkpoints store a position are older than the attributes.
_STORED_NAMES = {"step": "step", "largest": "longest", "loss": "loss", "harder": "few_digits"}


class Text(NamedTuple):
    """One text from a segment's edge on. All arrays have the same length, less than its segments hold."""

    ids: np.ndarray  # int32, without bos
    labels: np.ndarray  # int32, the ids, or IGNORED where no loss is taken
    loss_weights: np.ndarray  # float32, of each id as a label
    write_weights: np.ndarray  # float32; position i is the input before ids[i]
    segments: int
    n_bytes: int


class Difficulty(NamedTuple):
    """How far the difficulty has come."""

    harder: bool
    grown: bool  # the largest texts have reached their final size


class TextMaker(Protocol):
    """Makes the texts of a task. Sizes are in the maker's own unit: segments, or pairs."""

    noun: str  # what the texts are called in messages, in the plural
    bos_id: int  # before each text
    pad_id: int  # after it
    min_size: int  # of the smallest texts
    max_size: int  # of the largest texts once they have grown
    harder_below_loss: float | None  # texts get harder once the running mean loss is below; only then they grow
    grow_below_loss: float  # texts grow while the running mean loss is below

    def compose(
        self, random: np.random.Generator, size: int, room_segments: int, difficulty: Difficulty
    ) -> Text | None:
        """Makes a text of this size, or a smaller one.

        Args:
            random: determines the text.
            size: drawn for all lanes of the step.
            room_segments: segments left in the window.
            difficulty: how far it has come.

        Returns:
            The text; None if no text fits into the room.
        """
        ...


@dataclass(frozen=True)
class Progress:
    """Position of a `SyntheticReader`.

    Attributes:
        step: windows read.
        largest: size of the largest texts.
        loss: its running mean.
        harder: whether texts have become harder.
    """

    step: int
    largest: float
    loss: float
    harder: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dumps."""
        return {stored: getattr(self, name) for name, stored in _STORED_NAMES.items()}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Progress":
        """Inverse of `to_json`."""
        step, largest, loss, harder = (tree[stored] for stored in _STORED_NAMES.values())
        return cls(int(step), float(largest), float(loss), bool(harder))


class SyntheticReader:
    """Endless windows of texts.

    Args:
        maker: makes the texts.
        n_lanes: lanes of the global batch.
        window_tokens: positions of a lane in one batch, whole segments.
        segment_tokens: texts start at multiples of this.
        seed: determines the texts.
        rows: the lanes that this rank reads.
    """

    corrupt_documents = 0
    adaptive = True

    def __init__(
        self, maker: TextMaker, n_lanes: int, window_tokens: int, segment_tokens: int, seed: int, rows: slice
    ) -> None:
        assert window_tokens % segment_tokens == 0
        self.maker = maker
        self.window_tokens, self.segment_tokens = window_tokens, segment_tokens
        self.rows = range(n_lanes)[rows]
        self._seed = seed

    def mix(self, position: Progress) -> dict[str, float]:
        """Size of the largest texts, to log."""
        return {"texts/largest": position.largest}

    def start(self) -> Progress:
        """The position before the first window."""
        return Progress(0, float(self.maker.min_size), START_LOSS)

    def parse(self, tree: Mapping[str, Any]) -> Progress:
        """The position of a `Progress.to_json`."""
        return Progress.from_json(tree)

    def observe_loss(self, position: Progress, loss: float) -> Progress:
        """The position after its last window was trained on with this loss; texts get harder, then grow."""
        maker = self.maker
        after = dataclasses.replace(position, loss=LOSS_DECAY * position.loss + (1 - LOSS_DECAY) * loss)
        if maker.harder_below_loss is not None and not after.harder:
            if after.loss < maker.harder_below_loss:
                return dataclasses.replace(after, loss=START_LOSS, harder=True)
            return after
        if after.loss >= maker.grow_below_loss:
            return after
        largest = min(float(maker.max_size), after.largest * GROWTH_FACTOR + GROWTH_STEP)
        return dataclasses.replace(after, largest=largest)

    def name_documents(self, position: Progress) -> list[str]:
        """The number of the step, which determines all texts of the next window."""
        return [f"{self.maker.noun} of step {position.step + 1}"]

    def next(self, position: Progress) -> tuple[Batch, Progress]:
        """Next batch and following position."""
        shape = (len(self.rows), self.window_tokens)
        tokens_BT, labels_BT = np.full(shape, self.maker.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        starts_BT = np.zeros(shape, bool)
        weights_BT, loss_weights_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        size = self._draw_size(position)
        difficulty = Difficulty(position.harder, grown=position.largest >= self.maker.max_size)
        n_bytes = 0
        for row, lane in enumerate(self.rows):
            random = np.random.default_rng([self._seed, position.step, 1 + lane])
            first, segments = 0, self.window_tokens // self.segment_tokens
            while (text := self.maker.compose(random, size, segments - first, difficulty)) is not None:
                begin = first * self.segment_tokens
                columns = slice(begin, begin + len(text.ids))
                starts_BT[row, begin] = True
                tokens_BT[row, columns] = np.concatenate(([self.maker.bos_id], text.ids[:-1]))
                labels_BT[row, columns] = text.labels
                loss_weights_BT[row, columns], weights_BT[row, columns] = text.loss_weights, text.write_weights
                first, n_bytes = first + text.segments, n_bytes + text.n_bytes
        document_B = np.full(len(self.rows), position.step, np.int64)
        batch = Batch(tokens_BT, labels_BT, starts_BT, weights_BT, document_B, float(n_bytes), loss_weights_BT)
        return batch, dataclasses.replace(position, step=position.step + 1)

    def _draw_size(self, position: Progress) -> int:
        """Size of the step's texts, the same in all lanes; log-uniform."""
        largest = int(position.largest)
        random = np.random.default_rng([self._seed, position.step])
        return min(largest, int(math.exp(random.uniform(math.log(self.maker.min_size), math.log(largest + 1)))))
