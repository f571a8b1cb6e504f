"""YAML text and plain values: what is read, within which limits, and how it is written. Imports no torch.

A config is small by its nature. What is larger than any of them is refused before it costs memory or time: a few
hundred bytes of YAML can otherwise stand for gigabytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from infini_train.config.errors import ConfigError

MAX_BYTES = 2**20  # of one file
MAX_NODES = 20_000  # keys and values of a config and all that it includes, counted again wherever an alias stands
MAX_DEPTH = 50
MAX_DIGITS = 100  # of a number
SHOWN_CHARACTERS = 200  # of a text quoted in a message

_TAG = "tag:yaml.org,2002:"
_STR, _INT, _FLOAT = (f"{_TAG}{name}" for name in ("str", "int", "float"))
_UNREADABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass
class Budget:
    """What may still be read of one config."""

    nodes: int = MAX_NODES
    files: int = 100


class _Loader(yaml.SafeLoader):
    """Safe YAML within a budget.

    Refuses duplicate keys and tags, and reads 3e-4 as a number, 2026-01-31 and 12:00:00 as text.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        super().__init__(text)
        self._budget = budget
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of composed nodes, by identity; one that is still open has none

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", _STR):
            _refuse(f"the tag {_cut(tag).replace(_TAG, '!!')} is not read; write the value without it", event)
        if self._depth >= MAX_DEPTH:
            _refuse(f"nested more than {MAX_DEPTH} deep", event)
        before = self._budget.nodes
        self._spend(1 + len(getattr(event, "value", "")) // 1000, event)
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[id(node)] = before - self._budget.nodes
        elif id(node) in self._sizes:
            self._spend(self._sizes[id(node)], event)
        else:
            _refuse("an alias that contains itself", event)
        if node.tag in (_INT, _FLOAT) and len(node.value) > MAX_DIGITS:
            _refuse(f"a number of {len(node.value)} characters", event)
        return node

    def _spend(self, nodes: int, event: Any) -> None:
        self._budget.nodes -= nodes
        if self._budget.nodes < 0:
            _refuse(f"more than {MAX_NODES} keys and values, which no config has", event)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if found := _UNREADABLE.search(value):
            _refuse(f"holds the character {found[0]!a}, which is not allowed in a config", node)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                _refuse("a key must be text or a number", key_node)
            if key in seen:
                _refuse(f"{_cut(key)}: given twice", key_node, "; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


def _read_powers_of_ten(resolver: type[_Loader] | type[_Dumper]) -> None:
    """YAML 1.1 requires a decimal point and a signed exponent; PyYAML reads 3e-4 as a string."""
    number = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$")
    resolver.add_implicit_resolver(_FLOAT, number, list("-+.0123456789"))


def _read_times_as_text(loader: type[_Loader]) -> None:
    """YAML 1.1 reads a date as an object, and 12:00:00 as a number to the base of 60."""
    times = (_STR, re.compile(r"^[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?$"))
    loader.yaml_implicit_resolvers = {
        first: [times, *((tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp"))]
        for first, resolvers in loader.yaml_implicit_resolvers.items()
    }


_read_powers_of_ten(_Loader)
_read_powers_of_ten(_Dumper)
_read_times_as_text(_Loader)


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _refuse(problem: str, place: Any, advice: str = "") -> NoReturn:
    raise ConfigError(f"{problem} (line {place.start_mark.line + 1}){advice}")


def parse(text: str, source: str, budget: Budget | None = None) -> Any:
    """The value of a YAML text; an error message begins with `source` (a file, an option).

    Raises:
        ConfigError: it is not YAML, or more than a config can be.
    """
    try:
        loader = _Loader(text, budget or Budget())
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except ConfigError as error:
        raise ConfigError(f"{_cut(source)}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{_cut(source)}: not valid YAML{where}: {_cut(problem)}") from error
    except (ValueError, RecursionError) as error:  # 0x_ and other numbers without a digit, brackets nested too deep
        raise ConfigError(f"{_cut(source)}: not valid YAML: {_cut(str(error).splitlines()[0])}") from error


def dump_tree(tree: Mapping[str, Any]) -> str:
    """Plain values as YAML that this module reads back."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False)
