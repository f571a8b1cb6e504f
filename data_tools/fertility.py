"""How many bytes of text a token stands for, by tokenizer and source."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.documents import Document
from data_tools.tokenizer import cut_text
from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import Tokenizer, load_tokenizer
from infini_train.data.words import words


@dataclass
class Fertility:
    """Counts over a text; `exact`: decoding gives all of it back. In scripts without spaces, words are characters."""

    bytes: int = 0
    words: int = 0
    tokens: int = 0
    exact: bool = True

    def add(self, text: str, tokenizer: Tokenizer) -> None:
        """Count one more text."""
        ids = tokenizer.encode(text)
        self.bytes += len(text.encode("utf-8"))
        self.words += len(words(text))
        self.tokens += ids.size
        self.exact = self.exact and tokenizer.decode(ids) == text


def measure(
    documents: Iterable[Document],
    tokenizers: Sequence[str],
    limit_bytes: int,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> dict[str, dict[str, Fertility]]:
    """Counts by tokenizer and source, over at most `limit_bytes` from the beginning of the documents.

    Args:
        documents: to read from.
        tokenizers: as in `load_tokenizer`.
        limit_bytes: of text.
        advance: is called with the bytes of text that were measured.

    Raises:
        ConfigError: as `load_tokenizer`; a document is stored as token ids.
    """
    models = {name: load_tokenizer(name) for name in tokenizers}
    found: dict[str, dict[str, Fertility]] = {name: defaultdict(Fertility) for name in tokenizers}
    room = limit_bytes
    for document in documents:
        if document.tokens is not None:
            raise ConfigError(f"{document.id}: holds token ids, not text; give text")
        for piece in cut_text(document.text, 1_000_000):
            for name, model in models.items():
                found[name][document.source].add(piece, model)
            n_bytes = len(piece.encode("utf-8"))
            advance(n_bytes)
            room -= n_bytes
            if room <= 0:
                return found
    return found


def describe(found: dict[str, dict[str, Fertility]]) -> str:
    """The counts as a table."""
    lines = [f"{'bytes a token':>13} {'tokens a word':>13} {'exact':>5}  {'bytes':>14}  tokenizer, source"]
    for tokenizer, sources in found.items():
        for source, counts in sources.items():
            per_token, per_word = counts.bytes / max(counts.tokens, 1), counts.tokens / max(counts.words, 1)
            exact = "yes" if counts.exact else "no"
            lines.append(
                f"{per_token:13.3f} {per_word:13.3f} {exact:>5}  {counts.bytes:14,}  {Path(tokenizer).name}, {source}"
            )
    return "\n".join(lines)
