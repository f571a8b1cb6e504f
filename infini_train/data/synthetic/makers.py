"""From a config's synthetic texts to their tokenizer, vocabulary and maker: the one place that knows all kinds."""

from typing import assert_never

from infini_train.config.data import NeedlesConfig, PasskeyConfig, RecallConfig, SyntheticConfig
from infini_train.config.errors import naming
from infini_train.data.synthetic.needle_maker import NeedleMaker
from infini_train.data.synthetic.passkey_maker import PasskeyMaker
from infini_train.data.synthetic.reader import TextMaker
from infini_train.data.synthetic.recall import VOCABULARY, RecallMaker
from infini_train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


def open_tokenizer(config: SyntheticConfig) -> Tokenizer:
    """The tokenizer of the texts.

    Raises:
        ConfigError: its file can't be read.
    """
    if not isinstance(config, NeedlesConfig) or config.tokenizer is None:
        return ByteTokenizer()
    with naming("data.synthetic.tokenizer"):
        return load_tokenizer(config.tokenizer)


def count_ids(config: SyntheticConfig, tokenizer: Tokenizer) -> int:
    """Token ids that the texts use."""
    return VOCABULARY if isinstance(config, RecallConfig) else tokenizer.vocab_size


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
    match config:
        case PasskeyConfig():
            return PasskeyMaker(config, window_tokens, segment_tokens)
        case NeedlesConfig():
            return NeedleMaker(config, window_tokens, segment_tokens, tokenizer)
        case RecallConfig():
            return RecallMaker(config, window_tokens, segment_tokens)
        case _:
            assert_never(config)
