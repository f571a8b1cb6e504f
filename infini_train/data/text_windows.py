"""Texts made while training, as windows: a pure function of seed, step and lane, and of how well they were learned.

A window holds one text, or several short ones one behind the other, each from a segment's edge on, so that gradients
reach from an answer back to what it asks for. What a text is, and what its size counts, is its maker's; sizes grow
while the loss is low. Imports no torch.

Shapes: B lanes read by this rank, T window_tokens.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from infini_train.data.lanes import IGNORED, Batch
from infini_train.data.passkey_reader import START_LOSS, Progress


class LaidText(NamedTuple):
    """One text, laid out from a segment's edge on; the arrays are of the same length, less than its segments hold."""

    ids: np.ndarray  # int32, without bos
    loss_weights: np.ndarray  # float32, of each id as a label
    write_weights: np.ndarray  # float32; position i is the input before ids[i]
    segments: int
    n_bytes: int


class TextMaker(Protocol):
    """Makes the texts of a task."""

    @property
    def bos_id(self) -> int:
        """Before each text."""
        ...

    @property
    def pad_id(self) -> int:
        """Behind it."""
        ...

    @property
    def least(self) -> float:
        """Size of the smallest texts."""
        ...

    @property
    def most(self) -> float:
        """Size of the largest texts."""
        ...

    def draw_size(self, random: np.random.Generator, largest: float) -> int:
        """Of the texts of one step, the same in all lanes."""
        ...

    def compose(self, random: np.random.Generator, size: int, room_segments: int, grown: bool) -> LaidText | None:
        """A text of this size, a smaller one, or None if no text fits into the room.

        Args:
            random: gives the text.
            size: of the text.
            room_segments: that are left of the window.
            grown: the largest texts are as large as they will be.
        """
        ...


class TextReader:
    """Endless windows of texts.

    Args:
        maker: of the texts.
        name: what they are, for messages.
        grow_below_loss: sizes grow while the running mean of the loss is below this.
        n_lanes: lanes of the global batch.
        window_tokens: positions of a lane in one batch, whole segments.
        segment_tokens: of the model.
        seed: of the texts.
        rows: the lanes that this rank reads.
    """

    corrupt_documents = 0
    learns = True

    def __init__(
        self,
        maker: TextMaker,
        name: str,
        grow_below_loss: float,
        n_lanes: int,
        window_tokens: int,
        segment_tokens: int,
        seed: int,
        rows: slice,
    ) -> None:
        assert window_tokens % segment_tokens == 0
        self.maker, self.name = maker, name
        self.window_tokens, self.segment_tokens = window_tokens, segment_tokens
        self.rows = range(n_lanes)[rows]
        self._grow_below_loss, self._seed = grow_below_loss, seed

    def mix(self, position: Progress) -> dict[str, float]:
        """How large the largest texts are."""
        return {"texts/largest": position.longest}

    def start(self) -> Progress:
        """Before the first window."""
        return Progress(0, self.maker.least, START_LOSS)

    def parse(self, tree: Mapping[str, Any]) -> Progress:
        """The position of a `Progress.to_json`."""
        return Progress(int(tree["step"]), float(tree["longest"]), float(tree["loss"]))

    def learn(self, position: Progress, loss: float) -> Progress:
        """The position when its last window was learned with this loss: the texts grow while it is low."""
        after = position.learned(loss)
        return after.grown(self.maker.most) if after.loss < self._grow_below_loss else after

    def name_documents(self, position: Progress) -> list[str]:
        """The number of the step for which all texts of the window behind `position` are made."""
        return [f"{self.name} of step {position.step + 1}"]

    def next(self, position: Progress) -> tuple[Batch, Progress]:
        """The window behind a position, and the position behind the window."""
        shape = (len(self.rows), self.window_tokens)
        tokens_BT, labels_BT = np.full(shape, self.maker.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        starts_BT = np.zeros(shape, bool)
        weights_BT, loss_weights_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        size = self.maker.draw_size(np.random.default_rng([self._seed, position.step]), position.longest)
        n_bytes, grown = 0, position.longest >= self.maker.most
        for row, lane in enumerate(self.rows):
            random = np.random.default_rng([self._seed, position.step, 1 + lane])
            first, segments = 0, self.window_tokens // self.segment_tokens
            while (text := self.maker.compose(random, size, segments - first, grown)) is not None:
                begin = first * self.segment_tokens
                columns = slice(begin, begin + len(text.ids))
                starts_BT[row, begin] = True
                tokens_BT[row, columns] = np.concatenate(([self.maker.bos_id], text.ids[:-1]))
                labels_BT[row, columns] = np.where(text.loss_weights > 0, text.ids, IGNORED)
                loss_weights_BT[row, columns], weights_BT[row, columns] = text.loss_weights, text.write_weights
                first, n_bytes = first + text.segments, n_bytes + text.n_bytes
        document_B = np.full(len(self.rows), position.step, np.int64)
        batch = Batch(tokens_BT, labels_BT, starts_BT, weights_BT, document_B, float(n_bytes), loss_weights_BT)
        return batch, Progress(position.step + 1, position.longest, position.loss)
