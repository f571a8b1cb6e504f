"""JSON files that carry a checksum of themselves, so that a value changed by hand or by a disk is seen. No torch.

The checksum is the sha256 of all other fields as JSON with sorted keys and without spaces. It guards against accidents
and careless edits; whoever may write the file can also write a new checksum.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infini_train.config.errors import ConfigError
from infini_train.regular_files import read_regular

CHECKSUM = "checksum"
MAX_BYTES = 64_000_000  # of such a file; parsed, the worst of this size takes about 1.5 GB


def checksum(tree: Mapping[str, Any]) -> str:
    """The checksum of a tree, whether it holds one already or not."""
    rest = {name: value for name, value in tree.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dump_json(tree: Mapping[str, Any]) -> bytes:
    """The text of a file. Half a surrogate pair, which UTF-8 can't hold, is written as JSON's escape."""
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def dump_sealed(tree: Mapping[str, Any]) -> bytes:
    """The same with its checksum."""
    plain = json.loads(json.dumps(tree))  # what a reader will see: lists, keys that are text
    return dump_json({**plain, CHECKSUM: checksum(plain)})


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none; says what is wrong.
    """
    try:
        tree = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError("it is not a JSON object")
    return tree


def has_right_checksum(tree: Mapping[str, Any]) -> bool:
    """Whether the checksum is there and fits."""
    try:
        return bool(tree.get(CHECKSUM) == checksum(tree))
    except RecursionError:  # writing takes a deeper stack than reading
        return False


def read_sealed(path: Path, advice: str) -> dict[str, Any]:
    """The content of such a file, without the checksum.

    Args:
        path: of the file.
        advice: what to do if it is damaged; ends the message.

    Raises:
        ConfigError: it can't be read, or is not as it was written.
    """
    try:
        tree = parse_object(read_regular(path, MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}; {advice}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged ({error}); {advice}") from error
    if not has_right_checksum(tree):
        raise ConfigError(f"{path}: is not as it was written (its checksum differs); {advice}")
    del tree[CHECKSUM]
    return tree
