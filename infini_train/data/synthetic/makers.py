"""From a config's synthetic texts to their tokenizer, vocabulary and maker.

A new kind is its config class, its maker, a line here and one in `config.data.SYNTHETIC_KINDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infini_train.config.data import SyntheticConfig
from infini_train.config.errors import naming
from infini_train.data.synthetic.babilong_maker import BabilongMaker
from infini_train.data.synthetic.needle_maker import NeedleMaker
from infini_train.data.synthetic.passkey_maker import PasskeyMaker
from infini_train.data.synthetic.reader import TextMaker
from infini_train.data.synthetic.recall_maker import PAIR_IDS, RecallMaker
from infini_train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Kind:
    """What training needs to know of a kind of texts.

    Attributes:
        make: its maker, from the config, the tokens of a window, those of a segment, and the tokenizer.
        text_version: one more whenever the same config gives other texts (see identity.py).
        extra_ids: token ids after the tokenizer's.
    """

    make: Callable[[Any, int, int, Tokenizer], TextMaker]
    text_version: int
    extra_ids: int = 0


def _in_bytes(maker: Callable[[Any, int, int], TextMaker]) -> Callable[[Any, int, int, Tokenizer], TextMaker]:
    """For makers that know no tokenizer but bytes."""
    return lambda config, window_tokens, segment_tokens, _: maker(config, window_tokens, segment_tokens)


MAKERS: dict[str, Kind] = {
    "passkey": Kind(_in_bytes(PasskeyMaker), text_version=1),
    "needles": Kind(NeedleMaker, text_version=2),
    "recall": Kind(_in_bytes(RecallMaker), text_version=1, extra_ids=PAIR_IDS),
    "babilong": Kind(BabilongMaker, text_version=1),
}


def open_tokenizer(config: SyntheticConfig) -> Tokenizer:
    """The tokenizer of the texts.

    Raises:
        ConfigError: its file can't be read.
    """
    if config.tokenizer_file is None:
        return ByteTokenizer()
    with naming("data.synthetic.tokenizer"):
        return load_tokenizer(config.tokenizer_file)


def count_ids(config: SyntheticConfig, tokenizer: Tokenizer) -> int:
    """Token ids that the texts use."""
    return tokenizer.vocab_size + MAKERS[config.kind].extra_ids


def make_maker(config: SyntheticConfig, window_tokens: int, segment_tokens: int, tokenizer: Tokenizer) -> TextMaker:
    """The maker of the texts.

    Args:
        config: which texts.
        window_tokens: sequence length of a training window.
        segment_tokens: texts start at multiples of this.
        tokenizer: from `open_tokenizer`.

    Raises:
        ConfigError: the texts don't fit into a window, or something they need can't be read.
    """
    return MAKERS[config.kind].make(config, window_tokens, segment_tokens, tokenizer)
