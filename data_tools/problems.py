"""What is wrong with settings or with the corpus: errors that name settings, and counts of what is left out.

Errors here know the fields of the options, not the flags of a command line: the command puts its flags in.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from infini_train.command_errors import escape
from infini_train.config.errors import ConfigError

_PLACES = 5  # bad records that are named
_LINE_CHARS = 5000  # of a place or problem: a path may have 4096


class SettingError(ConfigError):
    """A mistake that a setting causes, or would resolve.

    `str` names settings by their fields; `named` by whatever the caller calls them.

    Args:
        template: the message. In braces stand settings, by their fields, and values: "{holdout}: {given} is not a
            share", "...; or pass {overwrite}".
        values: the values, by name. They may hold braces themselves.
    """

    def __init__(self, template: str, **values: object) -> None:
        self.template = template
        self.values = {name: str(value) for name, value in values.items()}
        super().__init__(self.named(lambda setting: setting))

    def named(self, name_of: Callable[[str], str]) -> str:
        """The message, with `name_of(field)` for each setting."""
        return self.template.format_map(_Names(self.values, name_of))

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes send it to their parent
        return _restore, (type(self), self.template, self.values)


class _Names(dict[str, str]):
    """The values, and for any other key the name of that setting."""

    def __init__(self, values: Mapping[str, str], name_of: Callable[[str], str]) -> None:
        super().__init__(values)
        self._name_of = name_of

    def __missing__(self, setting: str) -> str:
        return self._name_of(setting)


def _restore(kind: type[SettingError], template: str, values: dict[str, str]) -> SettingError:
    return kind(template, **values)


class BadRecordError(SettingError):
    """Input that can't be read; the message names file and record."""


@dataclass(kw_only=True)
class LeftOut:
    """What was left out, and the policy for records that can't be read.

    Attributes:
        on_bad_record: raise an error, or count the record and go on.
        max_bad_records: more than this many are an error all the same.
        documents: number of documents (of records, where they can't be read) by reason.
        places: the first few bad records, each with its file and place.
    """

    on_bad_record: Literal["error", "skip"] = "error"
    max_bad_records: int = 1000
    documents: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def bad(self, where: object, problem: str, advice: str) -> None:
        """Count a record that can't be read, or raise.

        Args:
            where: file and place, shown by `str`.
            problem: what is wrong with it.
            advice: what to do; may name settings in braces.

        Raises:
            BadRecordError: the policy is to stop, or there were too many.
        """
        problem = escape(problem[:_LINE_CHARS])
        if self.on_bad_record == "error":
            template = f"{{where}}: {{problem}}; {advice}, or pass {{on_bad_record}} skip"
            raise BadRecordError(template, where=escape(str(where)[:_LINE_CHARS]), problem=problem)
        self.documents["bad records"] += 1
        if len(self.places) < _PLACES:
            self.places.append(f"{escape(str(where)[:_LINE_CHARS])}: {problem}")
        self._check_limit()

    def add(self, other: "LeftOut") -> None:
        """Add another one's counts.

        Raises:
            BadRecordError: together they are too many.
        """
        self.documents.update(other.documents)
        self.places = (self.places + other.places)[:_PLACES]
        self._check_limit()

    def to_json(self) -> dict[str, Any]:
        """The counts."""
        return {"documents": dict(self.documents), "places": self.places}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The counts of `to_json`; no limit applies to them alone."""
        return cls(on_bad_record="skip", documents=Counter(tree["documents"]), places=tree["places"])

    def lines(self) -> list[str]:
        """The counts for people."""
        found = [f"left out {number:,} {reason}" for reason, number in sorted(self.documents.items())]
        return [*found, *(f"  {place}" for place in self.places)]

    def _check_limit(self) -> None:
        if self.on_bad_record == "skip" and self.documents["bad records"] > self.max_bad_records:
            raise BadRecordError(
                "more than {limit} bad records, first: {first}; fix them, or raise {max_bad_records}",
                limit=self.max_bad_records,
                first=self.places[0],
            )
