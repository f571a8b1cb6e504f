"""Types of fields that have limits, and the step from plain values to a validator.

The limits are generous: no real run comes near them. What lies beyond is a slip, and would end in an overflow, or in
hours of work for nothing.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from infini_train.config.errors import ConfigError
from infini_train.config.paths import MAX_NAME_BYTES, expand_home
from infini_train.config.yaml_text import MAX_DEPTH

MAX_RANKS = 2**17  # of a run
Layers = Annotated[int, Field(le=1000)]
Heads = Annotated[int, Field(le=2**14)]
Width = Annotated[int, Field(le=2**16)]  # of a vector; of the largest models in 2025: 2**14
WideWidth = Annotated[int, Field(le=2**20)]
TokenIds = Annotated[int, Field(le=2**24)]
Tokens = Annotated[int, Field(le=2**24)]  # in a window
Lanes = Annotated[int, Field(le=2**16)]
Ranks = Annotated[int, Field(le=MAX_RANKS)]
Stages = Annotated[int, Field(le=128)]
Few = Annotated[int, Field(le=1000)]
Many = Annotated[int, Field(le=2**20)]
Total = Annotated[int, Field(le=2**60)]  # over a whole run: steps, tokens
Step = Annotated[int, Field(ge=0, le=2**60)]

Factor = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Deviation = Annotated[float, Field(le=1e6, allow_inf_nan=False)]  # of initial values
GateInit = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]  # sigmoid(20) is 1 in fp32 already
Rate = Annotated[float, Field(le=1e6, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(ge=1e-38, le=1.0, allow_inf_nan=False)]  # 1e-38: fp32 has nothing smaller
Norm = Annotated[float, Field(le=1e30, allow_inf_nan=False)]
Theta = Annotated[float, Field(le=1e15, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0.001, le=1e8, allow_inf_nan=False)]  # three years


def _check_path(path: str) -> str:
    try:
        return expand_home(path)
    except ValueError as error:
        raise PydanticCustomError("path", "{problem}", {"problem": str(error)}) from error


def check_name(name: str) -> None:
    """Asked of a run that starts, not of a checkpoint that has its name already.

    Raises:
        ConfigError: a run can't be called that.
    """
    parts = name.split("/")
    long = max(len(part.encode()) for part in parts) > MAX_NAME_BYTES - 55  # files add a suffix to it
    if long or not name.isprintable() or not all(part.strip() for part in parts) or {".", ".."} & set(parts):
        raise ConfigError(
            f"name: must be able to name a folder, in one line of at most 200 bytes, not {name[:80]!a}; for a folder"
            " elsewhere give run_dir"
        )


FilePath = Annotated[str, AfterValidator(_check_path)]  # may begin with ~


def to_json(tree: Any, what: str = "config") -> str:
    """Plain values as JSON, for a validator.

    Raises:
        ConfigError: JSON or a validator can't hold one of them; the message names its field, or `what`.
    """
    _require_plain(tree, "", what)
    return json.dumps(tree)


def _require_plain(value: Any, path: str, what: str) -> None:
    if path.count(".") > MAX_DEPTH:
        raise ConfigError(f"{path.split('.')[0]}: nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            _require_plain(key, path, what)
            _require_plain(inner, f"{path}.{key}" if path else str(key), what)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _require_plain(inner, f"{path}.{number}", what)
    elif (problem := _find_problem(value)) is not None:
        raise ConfigError(f"{path or what}: {problem}")


def _find_problem(value: Any) -> str | None:
    """What hinders a single value."""
    if isinstance(value, str):
        return None if _is_unicode(value) else f"{value[:80]!a} holds a character that no text here may have"
    if isinstance(value, int):
        return None if abs(value) < 2**63 else "a number of more than 64 bits"
    if isinstance(value, float | None):
        return None
    return f"{type(value).__name__} is no value of a config; write it as text or number"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
