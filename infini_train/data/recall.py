"""Key-value recall: pairs, then questions for all of them in another order, behind a segment's edge.

    k1v1 k2v2 ... knvn | padding to a segment's edge | kj vj ki vi ...

A pair is one token, a key and a value each have one of their own, so that nothing has to be bound to a token before it:
who remembers the pairs answers everything, and one layer is enough. With `joined: false` a pair is the tokens of its
key and its value, and the value has to be bound to the key. There is no filler, and the memory is written with
the pairs alone. The number of pairs is the only difficulty. Loss lies on the values of the questions alone. Every key
comes once, so that no answer is told by an earlier one. (After multi-query associative recall: Arora et al., arXiv
2312.04927, where key and value are tokens side by side.) Imports no torch.
"""

import math

import numpy as np

from infini_train.config.data import RecallConfig
from infini_train.config.errors import ConfigError
from infini_train.data.text_windows import LaidText
from infini_train.data.tokenizer import ByteTokenizer

KEYS, VALUES = 128, 8  # keys are the ids below 128, values the 8 behind them
FIRST_PAIR = ByteTokenizer.vocab_size  # the pair of key k and value v is the id FIRST_PAIR + 8 k + v
VOCABULARY = FIRST_PAIR + KEYS * VALUES


class RecallMaker:
    """Texts of a number of pairs, which is their size.

    Args:
        config: how many pairs.
        window_tokens: a text must fit.
        segment_tokens: of the model.

    Raises:
        ConfigError: the largest text does not fit into a window.
    """

    bos_id, pad_id = ByteTokenizer.bos_id, ByteTokenizer.pad_id

    def __init__(self, config: RecallConfig, window_tokens: int, segment_tokens: int) -> None:
        self.segment_tokens, self.joined = segment_tokens, config.joined
        self.least, self.most = float(config.min_pairs), float(config.max_pairs)
        needed = count_segments(config.max_pairs, segment_tokens, config.joined) * segment_tokens
        if needed > window_tokens:
            raise ConfigError(
                f"data.recall.max_pairs: {config.max_pairs} pairs and their questions take {needed} tokens in segments"
                f" of {segment_tokens}; raise train.window_tokens to {needed}, or lower it"
            )

    def draw_size(self, random: np.random.Generator, largest: float) -> int:
        """Log-uniform."""
        low, high = math.log(self.least), math.log(int(largest) + 1)
        return min(int(largest), int(math.exp(random.uniform(low, high))))

    def compose(self, random: np.random.Generator, size: int, room_segments: int, grown: bool) -> LaidText | None:
        """So many pairs and all questions, if they fit."""
        if count_segments(size, self.segment_tokens, self.joined) > room_segments:
            return None
        return lay_pairs(random, size, self.segment_tokens, self.joined)


def count_segments(pairs: int, segment_tokens: int, joined: bool = True) -> int:
    """Of a text: those of bos and the pairs, and those of the questions and all answers but the last."""
    return -(-(1 + _stored_tokens(pairs, joined)) // segment_tokens) + -(-(2 * pairs - 1) // segment_tokens)


def _stored_tokens(pairs: int, joined: bool) -> int:
    return pairs if joined else 2 * pairs


def lay_pairs(random: np.random.Generator, pairs: int, segment_tokens: int, joined: bool = True) -> LaidText:
    """The text of random pairs.

    Args:
        random: gives keys, values and the order of the questions.
        pairs: at most `KEYS`.
        segment_tokens: of the model.
        joined: a pair is one token, not two.
    """
    stored = _stored_tokens(pairs, joined)
    keys, values = random.permutation(KEYS)[:pairs], random.integers(0, VALUES, pairs)
    order = random.permutation(pairs)
    first_question = -(-(1 + stored) // segment_tokens) * segment_tokens - 1  # the first input of its segment
    ids = np.full(first_question + 2 * pairs, ByteTokenizer.pad_id, np.int32)
    if joined:
        ids[:stored] = FIRST_PAIR + VALUES * keys + values
    else:
        ids[:stored:2], ids[1:stored:2] = keys, KEYS + values
    ids[first_question::2], ids[first_question + 1 :: 2] = keys[order], KEYS + values[order]
    loss_weights, write_weights = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
    loss_weights[first_question + 1 :: 2] = 1 / pairs
    write_weights[1 : stored + 1] = 1  # nothing but the pairs
    return LaidText(ids, loss_weights, write_weights, count_segments(pairs, segment_tokens, joined), len(ids))
