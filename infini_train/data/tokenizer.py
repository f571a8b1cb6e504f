"""Text to token ids and back: plain bytes, or a SentencePiece model. Imports no torch."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from infini_train.config import ConfigError

_CUT_CHARS = 4096  # a long text is encoded in pieces of at most this size: twice as fast as with 32768
_SPACE_SYMBOL = "\u2581"  # SentencePiece writes a space like this, so it would read the real character as a space


class Tokenizer(Protocol):
    """What the project needs of a tokenizer. `sha256` identifies it; `pad_id` never stands for text."""

    @property
    def kind(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of the text alone, without bos and eos."""
        ...

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text; uses several threads where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special ids stand for nothing, broken UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """One token a UTF-8 byte; needs no training."""

    kind = "byte"
    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258
    sha256 = hashlib.sha256(b"byte tokenizer 1: 256 bytes, bos 256, eos 257, pad 258").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model file.

    Models trained by `infini-data tokenizer` give every text back exactly; foreign ones may normalise it.

    Raises:
        ConfigError: no such file, not a SentencePiece model, or a model without bos or eos.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: the tokenizer can't be read: {error.strerror}") from error
        self.model_bytes = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        sentencepiece.set_min_log_level(2)  # it would print its C++ source lines over the user's screen
        try:
            if not model:
                raise ValueError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._model.vocab_size()
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: is not a SentencePiece model; give the .model file") from error
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if not self.vocab_size or min(self.bos_id, self.eos_id) < 0:
            raise ConfigError(f"{path}: the tokenizer has no bos or eos token; train it with both")
        pad_id: int = self._model.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        has_bytes = all(self._model.is_byte(i) for i in symbol)
        self._symbol_ids = symbol if has_bytes else self._model.encode(_SPACE_SYMBOL)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        pieces = [list(_cut(text)) for text in texts]
        flat = [piece for document in pieces for piece in document if piece != _SPACE_SYMBOL]
        encoded = iter(self._model.encode(flat, num_threads=threads)) if flat else iter(())
        result = []
        for document in pieces:
            ids = [self._symbol_ids if piece == _SPACE_SYMBOL else next(encoded) for piece in document]
            result.append(
                np.concatenate([np.asarray(part, np.int32) for part in ids]) if ids else np.zeros(0, np.int32)
            )
        return result

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size])


def _cut(text: str) -> Iterator[str]:
    """Pieces of the text, cut behind line ends where possible; each space symbol is a piece of its own."""
    start = 0
    while start < len(text):
        if text[start] == _SPACE_SYMBOL:
            yield _SPACE_SYMBOL
            start += 1
            continue
        stop = min(start + _CUT_CHARS, len(text))
        symbol = text.find(_SPACE_SYMBOL, start, stop)
        if symbol >= 0:
            stop = symbol
        elif stop < len(text):
            stop = (text.rfind("\n", start, stop) + 1) or stop
        yield text[start:stop]
        start = stop


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come; holds back a character until its last byte is there.

    Decodes a few known ids before the new ones, since the first piece of a decode may lose its space.
    """
    known: list[int] = []
    new: list[int] = []
    for token in ids:
        new.append(int(token))
        before, now = tokenizer.decode(known), tokenizer.decode(known + new)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            known, new = new, []
    if new and (rest := tokenizer.decode(known + new)[len(tokenizer.decode(known)) :]):
        yield rest


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a .model file, or the byte tokenizer for ``byte``.

    Raises:
        ConfigError: as `SentencePieceTokenizer`.
    """
    return ByteTokenizer() if str(name) == "byte" else SentencePieceTokenizer(name)


def tokenizer_of(folder: Path | str) -> Tokenizer:
    """The tokenizer that lies in a dataset's folder.

    Raises:
        ConfigError: no manifest, or the tokenizer is not the one that the dataset was encoded with.
    """
    path = Path(folder) / "manifest.json"
    try:
        entry = json.loads(path.read_bytes())["tokenizer"]
        kind, file, sha256 = entry["kind"], entry["file"], entry["sha256"]
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {os.strerror(error.errno or 0)}; is this a dataset?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not a dataset's manifest; encode the dataset again") from error
    if kind == "sentencepiece" and (not isinstance(file, str) or Path(file).name != file):
        raise ConfigError(f"{path}: tokenizer.file must name a file in the dataset's folder")
    tokenizer = load_tokenizer("byte" if kind == "byte" else path.parent / file)
    if tokenizer.sha256 != sha256:
        raise ConfigError(f"{path.parent}: the tokenizer is not the one the dataset was encoded with; encode it again")
    return tokenizer
