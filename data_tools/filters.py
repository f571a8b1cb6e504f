"""Cleaning one document at a time: what is changed in a text, and which texts are left out. Each step is counted."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_tools.problems import SettingError
from infini_train.data.words import symbol_share

_CONTROLS = re.compile(r"\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # all but tab and line end
# Those that separate: line ends of all kinds (of old Macs, pages, vertical tabs, NEL, Unicode's), and a unit's end.
_SEPARATORS = {**dict.fromkeys(["\r\n", *"\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"], "\n"), "\x1f": " "}
FILTERS_VERSION = (
    2  # 1: marks of Hindi and others were symbols, and control characters that separate went without trace
)
_LANGUAGE_CHARS = 20_000  # of a text, from which its language is detected


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """What to do with each document; the defaults change and leave out nothing."""

    nfc: bool = False  # compose characters: e and an accent become one
    strip_controls: bool = (
        False  # all but tab and line end; those that separate lines or words become line ends or spaces
    )
    min_chars: int = 0
    max_chars: int = 0  # 0: no limit
    max_repeated_lines: float = 1.0  # share of the characters in lines that repeat an earlier one
    max_symbols: float = 1.0  # share of the characters (without spaces) that are neither letters nor digits
    languages: tuple[str, ...] = ()  # ISO 639-1 codes; empty: all

    def __post_init__(self) -> None:
        for name in ("max_repeated_lines", "max_symbols"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{{{name}}}: must be a share from 0 to 1")
        for name in ("min_chars", "max_chars"):
            if getattr(self, name) < 0:
                raise SettingError(f"{{{name}}}: must not be negative")


class Filters:
    """Applies the options to texts, one after the other.

    Attributes:
        changed: how many documents each change has touched.

    Raises:
        SettingError: languages are given, and py3langid is not installed or does not know them.
    """

    def __init__(self, options: FilterOptions) -> None:
        self.options = options
        self.changed: Counter[str] = Counter()
        if options.languages:
            unknown = set(options.languages) - {name for name, _ in self._langid.rank("any text ranks them all")}
            if unknown:
                raise SettingError("{languages}: {names} is not known to py3langid", names=", ".join(sorted(unknown)))

    def change(self, text: str) -> str:
        """The text as it is kept."""
        options = self.options
        if options.nfc and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            self.changed["NFC"] += 1
        if options.strip_controls and _CONTROLS.search(text):
            text = _CONTROLS.sub(lambda found: _SEPARATORS.get(found[0], ""), text)
            self.changed["control characters"] += 1
        return text

    def reason_against(self, text: str) -> str | None:
        """Why the text is left out; None if it stays."""
        options = self.options
        if len(text) < options.min_chars:
            return "too short documents"
        if options.max_chars and len(text) > options.max_chars:
            return "too long documents"
        if options.max_symbols < 1 and symbol_share(text) > options.max_symbols:
            return "documents of too many symbols"
        if options.max_repeated_lines < 1 and repeated_share(text) > options.max_repeated_lines:
            return "documents of too many repeated lines"
        if options.languages and self._language(text) not in options.languages:
            return "documents of other languages"
        return None

    def _language(self, text: str) -> str:
        return self._langid.classify(text[:_LANGUAGE_CHARS])[0]

    @cached_property
    def _langid(self) -> Any:
        try:
            import py3langid
        except ImportError as error:
            template = "{languages}: needs py3langid; install it with: pip install 'infini-train[clean]'"
            raise SettingError(template) from error
        return py3langid


def repeated_share(text: str) -> float:
    """Share of the characters of all non-empty lines that are in a repeat of an earlier line."""
    lines = Counter(line for line in map(str.strip, text.splitlines()) if line)
    total = sum(len(line) * number for line, number in lines.items())
    return sum(len(line) * (number - 1) for line, number in lines.items()) / max(total, 1)
