"""Key-value recall: pairs of single tokens, then questions for all of them in another order, behind a segment's edge.

    k1 v1 k2 v2 ... kn vn | padding to a segment's edge | kj vj ki vi ...

The number of pairs is the only difficulty: there is no filler, and whoever remembers all pairs answers everything. Loss
lies on the values of the questions alone. Every key comes once, so that no answer is told by an earlier one. (Known as
multi-query associative recall: Arora et al., arXiv 2312.04927.) Imports no torch.
"""

import math

import numpy as np

from infini_train.config.data import RecallConfig
from infini_train.config.errors import ConfigError
from infini_train.data.text_windows import LaidText
from infini_train.data.tokenizer import ByteTokenizer

SYMBOLS = 128  # keys are the bytes below this one, values those from it on


class RecallMaker:
    """Texts of a number of pairs, which is their size.

    Args:
        config: how many pairs.
        window_tokens: a text must fit.
        segment_tokens: of the model.

    Raises:
        ConfigError: the largest text does not fit into a window.
    """

    def __init__(self, config: RecallConfig, window_tokens: int, segment_tokens: int) -> None:
        self.segment_tokens = segment_tokens
        self.least, self.most = float(config.min_pairs), float(config.max_pairs)
        needed = self.segments(config.max_pairs) * segment_tokens
        if needed > window_tokens:
            raise ConfigError(
                f"data.recall.max_pairs: {config.max_pairs} pairs and their questions take {needed} tokens in segments"
                f" of {segment_tokens}; raise train.window_tokens to {needed}, or lower it"
            )

    def segments(self, pairs: int) -> int:
        """Of a text: those of the pairs and those of the questions."""
        return 2 * -(-(2 * pairs + 1) // self.segment_tokens)  # one token more: bos, or the last label

    def draw_size(self, random: np.random.Generator, largest: float) -> int:
        """Log-uniform."""
        low, high = math.log(self.least), math.log(int(largest) + 1)
        return min(int(largest), int(math.exp(random.uniform(low, high))))

    def compose(self, random: np.random.Generator, size: int, room_segments: int) -> LaidText | None:
        """So many pairs and all questions, if they fit."""
        segments = self.segments(size)
        return lay_pairs(random, size, segments, self.segment_tokens) if segments <= room_segments else None


def lay_pairs(random: np.random.Generator, pairs: int, segments: int, segment_tokens: int) -> LaidText:
    """The text of random pairs.

    Args:
        random: gives keys, values and the order of the questions.
        pairs: at most `SYMBOLS`.
        segments: of the text; the second half is for the questions.
        segment_tokens: of the model.
    """
    keys, values = random.permutation(SYMBOLS)[:pairs], SYMBOLS + random.integers(0, SYMBOLS, pairs)
    order = random.permutation(pairs)
    told, asked = (np.stack(two, 1).ravel() for two in ((keys, values), (keys[order], values[order])))
    half = segments // 2 * segment_tokens - 1  # the first question is the first input of its segment
    ids = np.full(half + 2 * pairs, ByteTokenizer.pad_id, np.int32)
    ids[: 2 * pairs], ids[half:] = told, asked
    loss_weights, write_weights = np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32)
    loss_weights[half + 1 :: 2] = 1 / pairs
    write_weights[2 * pairs + 1 : half + 1] = 0  # padding is not written
    return LaidText(ids, loss_weights, write_weights, segments)
