"""(book, summary) pairs as one document: prompt, book, separator, summary. Imports no torch.

Each of the four is encoded separately, so that reading a book for a summary produces exactly the ids of training.
"""

from dataclasses import dataclass

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import Tokenizer

SEPARATOR = "\n\nSummary:\n"


@dataclass(frozen=True, kw_only=True)
class PairForm:
    """The text around a book; the same in training and evaluation."""

    prompt: str = ""  # before the book
    separator: str = SEPARATOR  # between book and summary

    def encode_book(self, tokenizer: Tokenizer, book: str, max_tokens: int | None = None) -> np.ndarray:
        """int32 ids to read before the summary, without bos.

        Args:
            tokenizer: the model's.
            book: its text.
            max_tokens: maximum length; a longer book is truncated.

        Raises:
            ConfigError: not even prompt and separator fit.
        """
        before, separator = tokenizer.encode(self.prompt), tokenizer.encode(self.separator)
        content = tokenizer.encode(book)
        if max_tokens is not None:
            room = max_tokens - len(before) - len(separator)
            if room < 1:
                raise ConfigError(f"max tokens: {max_tokens} leave no room for the book; give more")
            content = content[:room]
        return np.concatenate((before, content, separator))

    def encode(
        self, tokenizer: Tokenizer, book: str, summary: str, max_tokens: int | None = None
    ) -> tuple[np.ndarray, int]:
        """int32 ids of a pair without bos and eos, at most `max_tokens`, and the number before the summary.

        The summary stays whole; the book is truncated.

        Raises:
            ConfigError: there is no room for the book.
        """
        answer = tokenizer.encode(summary)
        if max_tokens is not None and max_tokens <= len(answer):
            raise ConfigError(f"max tokens: {max_tokens} can't hold a summary of {len(answer)} tokens; give more")
        read = self.encode_book(tokenizer, book, None if max_tokens is None else max_tokens - len(answer))
        return np.concatenate((read, answer)), len(read)
