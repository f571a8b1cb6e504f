"""Spellings of earlier versions, and what they are read as. Imports no torch.

`data.passkey`, `data.needles` and `data.recall` were three sections of which at most one could be given; they are now
kinds of `data.synthetic`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from infini_train.config.data import SYNTHETIC_KINDS
from infini_train.config.errors import ConfigError

_SECTION = "data.synthetic"


def modernise(tree: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The tree in the present spelling.

    Args:
        tree: of a file, an override, or the config that a checkpoint stores.
        base: what the tree will be merged into, already in the present spelling. An old section set to null clears
            the same section there, and means nothing elsewhere.

    Returns:
        The tree, and the names below `data` of the old sections that it used.

    Raises:
        ConfigError: two sections of which only one can be given.
    """
    data = tree.get("data")
    if not isinstance(data, Mapping) or not set(data) & set(SYNTHETIC_KINDS):
        return dict(tree), []
    new = {name: value for name, value in data.items() if name not in SYNTHETIC_KINDS}
    given = [name for name in SYNTHETIC_KINDS if data.get(name) is not None]
    if len(given) + (new.get("synthetic") is not None) > 1:
        names = [f"data.{name}" for name in given] + [_SECTION] * (new.get("synthetic") is not None)
        raise ConfigError(f"{' and '.join(names)}: give one of them only, as {_SECTION}")
    base_kind = _kind(base or {})
    if given:
        (name,) = given
        section = data[name]
        if isinstance(section, Mapping):
            # The old sections were independent: nothing is taken over from texts of another kind.
            defaults = {} if base_kind in (None, name) else dataclasses.asdict(SYNTHETIC_KINDS[name]())
            section = {**defaults, "kind": name, **section}
        new["synthetic"] = section
    elif base_kind in data and "synthetic" not in new:
        new["synthetic"] = None
        given = [base_kind]
    return {**tree, "data": new}, given


def _kind(tree: Mapping[str, Any]) -> Any:
    """The kind of the tree's synthetic texts."""
    data = tree.get("data")
    section = data.get("synthetic") if isinstance(data, Mapping) else None
    return section.get("kind") if isinstance(section, Mapping) else None


def advise(name: str) -> str:
    """What to write in a file instead of this section."""
    return f"data.{name} is deprecated; write {_SECTION} with kind: {name} and the same fields"


def advise_override(assignment: str, name: str) -> str:
    """What to write instead of an override of this section."""
    path, _, value = assignment.partition("=")
    field = path.strip().removeprefix(f"data.{name}")
    if path.strip() == "data":
        return advise(name)
    if field:
        return f"data.{name} is deprecated; write {_SECTION}{field}={value}, where {_SECTION}.kind is {name}"
    new = "null" if value.strip() in ("null", "~", "") else f"{{kind: {name}, ...}}"
    return f"data.{name} is deprecated; write {_SECTION}={new}"
