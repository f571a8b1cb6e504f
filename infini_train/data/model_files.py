"""Small files of a model's folder in Hugging Face's layout, which go with its tokenizer from import to export.

Chat templates and the names of special tokens are carried, not used. Of generation_config.json the ends of a text are
used. Imports no torch.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infini_train.atomic_files import write_atomic
from infini_train.config.errors import ConfigError
from infini_train.regular_files import read_regular, require_regular

TOKENIZER_CONFIG = "tokenizer_config.json"  # names bos and eos of a tokenizer.json
GENERATION_CONFIG = "generation_config.json"
OF_TOKENIZER = (  # the tokenizer's own are not here
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
MAX_FILE_BYTES = 2**26


def read_json(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ConfigError: it can't be read, holds none, or holds what no file of ours could hold again: numbers that are
            not finite, text that is no UTF-8.
    """
    try:
        tree = json.loads(read_regular(path, max_bytes), parse_float=_finite, parse_constant=_finite)
        json.dumps(tree, ensure_ascii=False).encode()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}; name a folder in Hugging Face's layout") from error
    except UnicodeEncodeError as error:
        wrong = f"{error.object[error.start : error.end]!a}"
        raise ConfigError(f"{path}: holds {wrong}, which can't be written as UTF-8; remove it") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply to be read") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: is not a JSON object")
    return tree


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def parse_end_ids(tree: Mapping[str, Any], source: Path | str) -> list[int]:
    """The ids that end a text, of config.json or generation_config.json: one, several or none.

    Raises:
        ConfigError: they are no ids.
    """
    given = tree.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(number) is int for number in ids):
        raise ConfigError(f"{source}: eos_token_id: must be a token id, or a list of them")
    return list(dict.fromkeys(ids))


def find_tokenizer_files(folder: Path) -> list[str]:
    """Names of the files that belong to the tokenizer in a folder, other than the tokenizer itself.

    Raises:
        ConfigError: one is a link that leads nowhere, or no file.
    """
    templates = [path for name in TEMPLATE_FOLDERS for path in sorted((folder / name).glob("*.jinja"))]
    paths = [folder / name for name in OF_TOKENIZER] + templates
    return [str(path.relative_to(folder)) for path in paths if _is_there(path)]


def copy_model_files(source: Path, target: Path, *, of_tokenizer: bool = True) -> None:
    """Copies generation_config.json from one folder to another, and what belongs to the tokenizer unless it is another.

    Files that are there already stay, so that a run that is resumed keeps its own.

    Raises:
        ConfigError: one can't be read.
        OSError: one can't be written.
    """
    generation = [GENERATION_CONFIG] if _is_there(source / GENERATION_CONFIG) else []
    for name in [*(find_tokenizer_files(source) if of_tokenizer else []), *generation]:
        if not (target / name).exists():
            write_small(target / name, read_small(source / name))


def read_small(path: Path) -> bytes:
    """The content of one of these files; one that ends in .json holds an object.

    Raises:
        ConfigError: it can't be read.
    """
    if path.suffix == ".json":
        read_json(path)
    try:
        return read_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error


def write_small(path: Path, content: bytes) -> None:
    """Writes one of these files, with its folder."""
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, content)


def _is_there(path: Path) -> bool:
    if not path.exists() and not path.is_symlink():
        return False
    try:
        require_regular(path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    return True
