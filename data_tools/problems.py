"""What is left out of a corpus, and why: bad records, empty documents, what cleaning takes away."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from infini_train.config.errors import ConfigError

_PLACES = 5  # bad records that are named


class BadRecordError(ConfigError):
    """Input that can't be read; the message names file and record."""


@dataclass(kw_only=True)
class LeftOut:
    """What was left out, and the policy for records that can't be read.

    Attributes:
        on_bad_record: raise an error, or count and go on.
        max_bad_records: so many are counted; one more is an error.
        documents: number of documents (of records, where they can't be read) by reason.
        places: the first few bad records, each with its file and place.
    """

    on_bad_record: Literal["error", "skip"] = "error"
    max_bad_records: int = 1000
    documents: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def bad(self, where: object, what: str, hint: str) -> None:
        """A record that can't be read; `where` is shown as text.

        Raises:
            BadRecordError: the policy is to stop, or there were too many.
        """
        if self.on_bad_record == "error":
            raise BadRecordError(f"{where}: {what}; {hint}, or pass --on-bad-record skip")
        self.documents["bad records"] += 1
        if len(self.places) < _PLACES:
            self.places.append(f"{where}: {what}")
        self._check_limit()

    def add(self, other: "LeftOut") -> None:
        """Count what another one has counted.

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
    def from_json(cls, tree: dict[str, Any]) -> "LeftOut":
        """The counts of `to_json`; they alone are never too many."""
        return cls(on_bad_record="skip", documents=Counter(tree["documents"]), places=tree["places"])

    def lines(self) -> list[str]:
        """The counts for people."""
        found = [f"left out {number:,} {reason}" for reason, number in sorted(self.documents.items())]
        return [*found, *(f"  {place}" for place in self.places)]

    def _check_limit(self) -> None:
        if self.on_bad_record == "skip" and self.documents["bad records"] > self.max_bad_records:
            first = self.places[0]
            raise BadRecordError(
                f"more than {self.max_bad_records} bad records, first: {first}; mend them, or raise --max-bad-records"
            )
