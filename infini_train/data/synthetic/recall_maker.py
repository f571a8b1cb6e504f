"""Key-value recall: pairs, then a question for each of them in another order, from a segment's edge on.

    k1v1 k2v2 ... knvn | padding to a segment's edge | kj vj ki vi ...

A pair is one token, and each key and value also has a token of its own, so nothing has to be bound to the token before
it: a model that remembers the pairs answers everything, and one layer is enough. With `joined: false` a pair is two
tokens, key and value, and the value has to be bound to the key. There is no filler, and only the pairs are written to
the memory. The number of pairs is the only difficulty. Loss is taken on the values of the questions alone. Every key
occurs once, so no answer follows from an earlier one. (After multi-query associative recall: Arora et al., arXiv
2312.04927, where key and value are adjacent tokens.) Imports no torch.
"""

import numpy as np

from infini_train.config.data import RecallConfig
from infini_train.config.errors import ConfigError
from infini_train.data.lanes import IGNORED
from infini_train.data.synthetic.reader import Difficulty, Text
from infini_train.data.tokenizer import ByteTokenizer

KEYS, VALUES = 128, 8  # keys are the ids below 128, values the 8 after them
FIRST_PAIR = ByteTokenizer.vocab_size  # the pair of key k and value v is the id FIRST_PAIR + 8 k + v
PAIR_IDS = KEYS * VALUES
VOCABULARY = FIRST_PAIR + PAIR_IDS


class RecallMaker:
    """Makes texts whose size is their number of pairs.

    Args:
        config: numbers of pairs, and their form.
        window_tokens: the largest text must fit into it.
        segment_tokens: the model's.

    Raises:
        ConfigError: the largest text does not fit into a window.
    """

    noun = "pairs"
    harder_below_loss: float | None = None
    bos_id, pad_id = ByteTokenizer.bos_id, ByteTokenizer.pad_id

    def __init__(self, config: RecallConfig, window_tokens: int, segment_tokens: int) -> None:
        self.segment_tokens, self.joined = segment_tokens, config.joined
        self.min_size, self.max_size, self.grow_below_loss = config.min_pairs, config.max_pairs, config.grow_below_loss
        needed = count_segments(config.max_pairs, segment_tokens, config.joined) * segment_tokens
        if needed > window_tokens:
            raise ConfigError(
                f"data.synthetic.max_pairs: {config.max_pairs} pairs and their questions take {needed} tokens in"
                f" segments of {segment_tokens}; raise train.window_tokens to {needed}, or lower it"
            )

    def compose(
        self, random: np.random.Generator, size: int, room_segments: int, difficulty: Difficulty
    ) -> Text | None:
        """See `TextMaker.compose`; texts are never smaller than asked for."""
        if count_segments(size, self.segment_tokens, self.joined) > room_segments:
            return None
        return make_pairs(random, size, self.segment_tokens, self.joined)


def count_segments(pairs: int, segment_tokens: int, joined: bool = True) -> int:
    """Segments of a text: those of bos and the pairs, and those of the questions and all answers but the last."""
    return -(-(1 + _stored_tokens(pairs, joined)) // segment_tokens) + -(-(2 * pairs - 1) // segment_tokens)


def _stored_tokens(pairs: int, joined: bool) -> int:
    return pairs if joined else 2 * pairs


def make_pairs(random: np.random.Generator, pairs: int, segment_tokens: int, joined: bool = True) -> Text:
    """A text of random pairs.

    Args:
        random: determines keys, values and the order of the questions.
        pairs: at most `KEYS`.
        segment_tokens: the model's.
        joined: a pair is one token; false: two.
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
    answers = slice(first_question + 1, None, 2)
    ids[first_question::2], ids[answers] = keys[order], KEYS + values[order]
    labels = np.full(len(ids), IGNORED, np.int32)
    loss_weights, write_weights = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
    labels[answers], loss_weights[answers] = ids[answers], 1 / pairs
    write_weights[1 : stored + 1] = 1  # the pairs only
    return Text(ids, labels, loss_weights, write_weights, count_segments(pairs, segment_tokens, joined), len(ids))
