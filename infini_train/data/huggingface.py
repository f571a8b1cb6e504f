"""Tokenizers in Hugging Face's tokenizer.json format, through the `tokenizers` library. Imports no torch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.manifest import token_dtype

# Names that models use, for files without a tokenizer_config.json next to them.
_BEGIN = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|endoftext|>", "[CLS]")
_END = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "[SEP]")
_PAD = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|pad|>", "<|padding|>")


class HuggingFaceTokenizer:
    """A tokenizer.json file. Names of special tokens inside a text are plain text; documents are always encoded whole.

    Args:
        path: the file; bos, eos and pad come from a tokenizer_config.json next to it, else from the usual names.
        special_ids: bos, eos and pad, if known.

    Raises:
        ConfigError: no such file, not a tokenizer, no bos or eos, or the library is not installed.
    """

    kind = "huggingface"
    file_name = "tokenizer.json"
    cuts = None

    def __init__(self, path: Path | str, special_ids: tuple[int, int, int] | None = None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(
                f"{path}: needs the tokenizers library; install it with: pip install 'infini-train[tokenizers]'"
            ) from error
        self.path = Path(path)
        try:
            self.model_bytes = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: the tokenizer can't be read: {error.strerror}") from error
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        try:
            self._model = tokenizers.Tokenizer.from_buffer(self.model_bytes)
        except Exception as error:  # the library raises this class itself
            raise ConfigError(f"{path}: is not a tokenizer.json: {str(error).splitlines()[0]}") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # or "</s>" in a text would end the document
        self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id, self.pad_id = special_ids or self._find_special_ids()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        dtype = token_dtype(self.vocab_size)
        if threads == 1:
            return [np.array(self._model.encode(text, add_special_tokens=False).ids, dtype) for text in texts]
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self._model.decode(known, skip_special_tokens=True)

    def token(self, number: int) -> str | None:
        """The token of an id, as the file spells it; None: no such id."""
        return self._model.id_to_token(number)

    def _find_special_ids(self) -> tuple[int, int, int]:
        """Ids of bos, eos and pad; a missing bos or pad is eos."""
        config = self._config()
        eos = self._id_of(config.get("eos_token"), _END)
        bos = self._id_of(config.get("bos_token"), _BEGIN)
        if eos is None:
            raise ConfigError(f"{self.path}: no end-of-text token found; put tokenizer_config.json beside it")
        pad = self._id_of(config.get("pad_token"), _PAD)
        return (eos if bos is None else bos, eos, eos if pad is None else pad)

    def _config(self) -> dict[str, Any]:
        path = self.path.with_name("tokenizer_config.json")
        try:
            config = json.loads(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: can't be read: {error}") from error
        return config if isinstance(config, dict) else {}

    def _id_of(self, named: Any, usual: tuple[str, ...]) -> int | None:
        """Id of a token named in tokenizer_config.json (as text, or in an object), or of the first usual name found."""
        content = named.get("content") if isinstance(named, dict) else named
        names = (content,) if isinstance(content, str) else usual
        return next((found for name in names if (found := self._model.token_to_id(name)) is not None), None)
