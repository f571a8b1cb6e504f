"""Spellings of earlier versions, and what they are read as now. Imports no torch.

`data.passkey`, `data.needles` and `data.recall` were three sections of which at most one could be given; they are now
kinds of `data.synthetic`.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

from infini_train.config.data import SYNTHETIC_KINDS
from infini_train.config.errors import ConfigError, naming

_SECTION = "data.synthetic"
_OLD_SECTIONS = ("passkey", "needles", "recall")  # below data; later kinds never were sections of their own


def modernise(tree: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], str | None]:
    """The tree in the present spelling.

    Args:
        tree: of a file, an override, or the config that a checkpoint stores.
        base: what the tree will be merged into, already in the present spelling. An old section set to null clears
            the same section there, and means nothing elsewhere.

    Returns:
        The tree, and the name (below `data`) of the old section that it used; None: none.

    Raises:
        ConfigError: two sections of which only one can be given.
    """
    data = tree.get("data")
    if not isinstance(data, Mapping) or not set(data) & set(_OLD_SECTIONS):
        return dict(tree), None
    new = {name: value for name, value in data.items() if name not in _OLD_SECTIONS}
    given = [name for name in _OLD_SECTIONS if data.get(name) is not None]
    if len(given) + (new.get("synthetic") is not None) > 1:
        names = [f"data.{name}" for name in given] + [_SECTION] * (new.get("synthetic") is not None)
        raise ConfigError(f"{' and '.join(names)}: give only one of them, as {_SECTION}")
    base_kind = _synthetic_kind(base or {})
    old = given[0] if given else None
    if old is not None:
        new["synthetic"] = _modernise_section(data[old], old, base_kind)
    elif base_kind in data and "synthetic" not in new:
        new["synthetic"], old = None, base_kind
    return {**tree, "data": new}, old


def _modernise_section(section: Any, kind: str, base_kind: str | None) -> Any:
    if not isinstance(section, Mapping):
        return section  # a mistake, which validation will name
    # The old sections were independent: nothing is taken over from texts of another kind.
    defaults = {} if base_kind in (None, kind) else dataclasses.asdict(SYNTHETIC_KINDS[kind](kind=kind))
    return {**defaults, "kind": kind, **section}


def _synthetic_kind(tree: Mapping[str, Any]) -> str | None:
    data = tree.get("data")
    section = data.get("synthetic") if isinstance(data, Mapping) else None
    return section.get("kind") if isinstance(section, Mapping) else None


def modernise_file(tree: Mapping[str, Any], base: Mapping[str, Any], source: str) -> dict[str, Any]:
    """As `modernise`, for the tree of a file; logs what to write instead of an old spelling."""
    with naming(source):
        new, old = modernise(tree, base)
    if old is not None:
        note_once(f"{source}: data.{old} is deprecated; write {_SECTION} with kind: {old} and the same fields")
    return new


def modernise_override(tree: Mapping[str, Any], base: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """As `modernise`, for the tree of a --set assignment; logs what to write instead of an old spelling."""
    with naming(f"--set {assignment}"):
        new, old = modernise(tree, base)
    if old is None:
        return new
    path, _, value = assignment.partition("=")
    field = path.strip().removeprefix(f"data.{old}")
    if field == path.strip():  # all of data
        advice = f"{_SECTION} with kind: {old} and the same fields"
    elif field:
        advice = f"{_SECTION}{field}={value}, where {_SECTION}.kind is {old}"
    else:
        advice = f"{_SECTION}={'null' if new['data']['synthetic'] is None else f'{{kind: {old}, ...}}'}"
    note_once(f"--set {assignment}: data.{old} is deprecated; write {advice}")
    return new


@functools.cache
def note_once(message: str) -> None:
    """Logs a warning once; of several ranks only the first does."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        logging.getLogger(__name__).warning("%s", message)
