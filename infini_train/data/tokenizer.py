"""Text to token ids and back: plain bytes, a SentencePiece model, or a tokenizer.json. Imports no torch."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from infini_train.config.errors import ConfigError
from infini_train.data.cuts import SPACE_SYMBOL, batches, cuts_of, keeps_text, parse_model
from infini_train.data.huggingface import HuggingFaceTokenizer, read_model
from infini_train.data.manifest import MANIFEST_FILE, Manifest, hash_file, read_manifest, token_dtype
from infini_train.data.pieces import PieceEncoder, encode_each

SHORT_CHARS = 1000  # texts up to this length are encoded in one call
CONTEXT_TOKENS = 32  # before a text that is decoded: more than the bytes of any character


class Tokenizer(Protocol):
    """What the project needs from a tokenizer. `sha256` identifies it; `pad_id` never stands for text."""

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
    @property
    def file_name(self) -> str | None:
        """Name of its copy in a dataset's folder; None: it needs no file."""
        ...

    @property
    def model_bytes(self) -> bytes:
        """Content of that file."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of the text, without bos and eos."""
        ...

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of each text in the dtype that shards store; uses several threads if the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special ids are dropped, invalid UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte; needs no training."""

    kind, file_name, model_bytes = "byte", None, b""
    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258
    sha256 = hashlib.sha256(b"byte tokenizer 1: 256 bytes, bos 256, eos 257, pad 258").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(token_dtype(self.vocab_size)) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model file.

    Models trained by `infini-data tokenizer` reproduce every text exactly; others may normalise it. The ids are those
    of the whole text, except that the character U+2581, which SentencePiece can't distinguish from a space, gets the
    ids of its bytes (models that normalise read it as a space).

    Attributes:
        around: what the model adds before and after each non-empty text: nothing, or a space.
        piece_encoder: encodes texts in pieces; None if this model may not be cut into pieces.

    Raises:
        ConfigError: no such file, not a SentencePiece model, or a model without bos or eos.
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.model_bytes = read_model(self.path)
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        sentencepiece.set_min_log_level(2)  # else it prints C++ source lines to the user's terminal
        try:
            self._load()
        except (RuntimeError, ValueError, TypeError) as error:  # of the library, or of protobuf
            raise ConfigError(f"{path}: is not a SentencePiece model; give the .model file") from error
        if not self.vocab_size or min(self.bos_id, self.eos_id) < 0:
            raise ConfigError(f"{path}: the tokenizer has no bos or eos token; train it with both")

    def _load(self) -> None:
        if not self.model_bytes:
            raise ValueError("empty file")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        pad_id: int = self._model.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self._dtype = token_dtype(self.vocab_size)  # half of int32: the ids of documents dominate memory
        proto = parse_model(self.model_bytes)
        self._keeps_text = keeps_text(proto)
        self.around = ("", "")
        self._inner = self._model  # adds nothing
        cuts = cuts_of(proto)
        if self._keeps_text and proto.normalizer_spec.add_dummy_prefix:
            self.around = ("", " ") if proto.trainer_spec.treat_whitespace_as_suffix else (" ", "")
            proto.normalizer_spec.add_dummy_prefix = False
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        has_bytes = all(self._model.is_byte(i) for i in symbol)
        self._symbol_ids = np.array(symbol if has_bytes else self._inner.encode(SPACE_SYMBOL), self._dtype)
        self.piece_encoder = (
            PieceEncoder(cuts, self._inner, self._symbol_ids, self._dtype) if cuts is not None else None
        )

    def encode(self, text: str) -> np.ndarray:
        if len(text) > SHORT_CHARS or SPACE_SYMBOL in text:
            return self.encode_many([text])[0].astype(np.int32)
        before, after = self.around  # the same ids, without the tables that many texts need
        return np.array(self._inner.encode(f"{before}{text}{after}" if text else ""), np.int32)

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        before, after = self.around
        marked = [f"{before}{text}{after}" if text and before + after else text for text in texts]  # no needless copies
        if self.piece_encoder is not None:
            return self.piece_encoder.encode(marked, threads)
        parts: list[list[np.ndarray]] = [[np.zeros(0, self._dtype)] for _ in texts]
        pieces = ((number, piece) for number, text in enumerate(marked) for piece in self._pieces(text))
        for batch in batches(pieces):
            ids = encode_each(self._inner, [piece for _, piece in batch], threads, return_type="numpy")
            for (number, piece), array in zip(batch, ids, strict=True):
                is_symbol = self._keeps_text and piece == SPACE_SYMBOL
                parts[number].append(self._symbol_ids if is_symbol else array.astype(self._dtype))
        return [np.concatenate(part) for part in parts]

    def special_tokens(self) -> dict[str, str]:
        """Those that the model has of bos, eos, unk and pad, as it spells them."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self._model.unk_id(), "pad": self._model.pad_id()}
        return {name: self._model.id_to_piece(number) for name, number in ids.items() if number >= 0}

    def _pieces(self, text: str) -> Iterator[str]:
        """Splits the text around each space symbol, if the model would read that as a space."""
        if not self._keeps_text:
            yield text
            return
        for number, plain in enumerate(text.split(SPACE_SYMBOL)):
            if number:
                yield SPACE_SYMBOL
            if plain:
                yield plain

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size])


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Text of ids as they arrive; holds a character back until its last byte has arrived.

    Decodes a few earlier ids before the new ones, since the first piece of a decode may lose its space.

    Args:
        tokenizer: of the ids.
        ids: one after the other.
        before: ids that the text stands after, such as a prompt's; they are not shown.
    """
    known = list(before[-CONTEXT_TOKENS:])
    new: list[int] = []
    for token in ids:
        new.append(int(token))
        earlier, now = tokenizer.decode(known), tokenizer.decode(known + new)
        if len(now) > len(earlier) and not now.endswith("\ufffd"):
            yield now[len(earlier) :]
            known, new = new, []
    if new and (rest := tokenizer.decode(known + new)[len(tokenizer.decode(known)) :]):
        yield rest


def load_tokenizer(name: str | Path, special_ids: tuple[int, int, int] | None = None) -> Tokenizer:
    """The tokenizer of a .model or tokenizer.json file, or the byte tokenizer for ``byte``.

    Args:
        name: the file, or byte.
        special_ids: bos, eos and pad of a tokenizer.json, if known; the file does not contain them.

    Raises:
        ConfigError: as in `SentencePieceTokenizer` and `HuggingFaceTokenizer`.
    """
    if str(name) == "byte":
        return ByteTokenizer()
    if Path(name).suffix != ".json":
        return SentencePieceTokenizer(name)
    return HuggingFaceTokenizer(name, special_ids)


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """Tokenizer files next to a checkpoint's own files, as in a shipped model, and in its run's folder."""
    kinds = (SentencePieceTokenizer, HuggingFaceTokenizer)
    files = (folder / kind.file_name for folder in (checkpoint, checkpoint.parent.parent) for kind in kinds)
    return [file for file in files if file.is_file()]


def find_tokenizer(
    checkpoint: Path, sha256: str | None, special_ids: tuple[int, int, int] | None
) -> tuple[Tokenizer, Path | None] | None:
    """The tokenizer that a checkpoint was trained with, and its file (None: bytes); None if it is missing.

    Args:
        checkpoint: its folder, resolved.
        sha256: hash of the tokenizer.
        special_ids: as in `load_tokenizer`.

    Raises:
        ConfigError: a file can't be read as a tokenizer.
    """
    if sha256 == ByteTokenizer.sha256:
        return ByteTokenizer(), None
    for file in tokenizer_files(checkpoint):
        tokenizer = load_tokenizer(file, special_ids)
        if tokenizer.sha256 == sha256:
            return tokenizer, file
    return None


def tokenizer_of(folder: Path | str) -> Tokenizer:
    """The tokenizer in a dataset's folder.

    Raises:
        ConfigError: no manifest, or another tokenizer than the one that the dataset was encoded with, or other ids.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    entry = manifest.tokenizer
    advice = "copy the dataset again, or encode it again"
    other = ConfigError(f"{folder}: the tokenizer is not the one the dataset was encoded with; {advice}")
    if entry.kind == ByteTokenizer.kind:
        tokenizer: Tokenizer = ByteTokenizer()
    elif entry.file is None:
        raise other
    else:
        path = folder / entry.file
        try:
            if hash_file(path) != entry.sha256:  # before a library parses it
                raise other
        except OSError as error:
            raise ConfigError(f"{path}: the tokenizer can't be read: {error.strerror}") from error
        tokenizer = load_tokenizer(path, manifest.special_ids)
    if (tokenizer.sha256, tokenizer.kind) != (entry.sha256, entry.kind):
        raise other
    check_ids(manifest, tokenizer, str(folder))
    return tokenizer


def check_ids(manifest: Manifest, tokenizer: Tokenizer, place: str) -> None:
    """Compare a dataset's vocabulary and special ids with those of its tokenizer.

    Raises:
        ConfigError: names the first that differs; begins with `place`.
    """
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        said, right = getattr(manifest, name), getattr(tokenizer, name)
        if said != right:
            raise ConfigError(
                f"{place}: {name} is {said} in {MANIFEST_FILE} and {right} in the tokenizer; copy the dataset again,"
                " or encode it again"
            )
