"""Words, symbols and sentences of texts in any script. Imports no torch.

Words of Chinese, Thai or Burmese have no spaces around them, and a vowel sign of Hindi is no letter to Python's `re`.
Where a script is written without spaces, each character with its marks counts as a word here: Unicode's own rule
(UAX #29) where no dictionary is at hand. ASCII texts are cut as `str.split` or `[a-z0-9]+` cut them.
"""

import unicodedata

import regex

_SCRIPTS = (
    *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar"),
    *("Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese", "Batak", "Buginese"),
)
_UNSPACED = "".join(rf"\p{{{script}}}" for script in _SCRIPTS) + "\u30fc\uff70"  # and the long vowel of all kana
_SEPARATORS = r"\u0f0b\u0f0c\u1361"  # between syllables of Tibetan, and words of Ethiopic
_LETTER = r"(?=[\p{L}\p{N}])"

_HAS_MORE_WORDS = regex.compile(f"[{_UNSPACED}{_SEPARATORS}]")
_PARTS = regex.compile(rf"[{_UNSPACED}][\p{{M}}\p{{P}}\p{{Cf}}]*|[^\s{_UNSPACED}{_SEPARATORS}]+")
_PLAIN = regex.compile(rf"{_LETTER}(?:[{_UNSPACED}]\p{{M}}*|[^{_UNSPACED}\W\p{{Pc}}]+)")
WORD_EDGE = regex.compile(rf"\s|{_LETTER}(?=[{_UNSPACED}])")  # where any text may be cut without cutting a word
_FORMAT = regex.compile(r"\p{Cf}")  # joiners, zero-width spaces, soft hyphens, marks of direction
_ZERO_WIDTH_SPACE = "\u200b"
_SYMBOLS = regex.compile(f"[^\\p{{L}}\\p{{M}}\\p{{N}}\\p{{Cf}}_\\s{_SEPARATORS}]")
_NOT_COUNTED = regex.compile(f"[\\p{{M}}\\p{{Cf}}\\s{_SEPARATORS}]")
_SENTENCE_END = regex.compile(r"[.!?\p{Sentence_Terminal}]|(?<=[\p{Thai}\p{Lao}])\s")


def words(text: str) -> list[str]:
    """The words with the punctuation that touches them, as `str.split`; in scripts without spaces, the characters."""
    if text.isascii() or _HAS_MORE_WORDS.search(text) is None:
        return text.split()
    return [word for token in text.split() for word in _parts(token)]


def _parts(token: str) -> list[str]:
    if _HAS_MORE_WORDS.search(token) is None:
        return [token]
    found: list[str] = _PARTS.findall(token)
    if _FORMAT.search(token) is None:
        return found
    return [_FORMAT.sub("", part) if _HAS_MORE_WORDS.match(part) else part for part in found]


def plain_words(text: str) -> list[str]:
    """The words in small letters, composed, without punctuation and symbols."""
    text = _FORMAT.sub("", text.replace(_ZERO_WIDTH_SPACE, " "))
    return _PLAIN.findall(unicodedata.normalize("NFC", text.casefold()))


def has_unspaced_words(text: str) -> bool:
    """Whether some of it is in a script that puts no spaces between words."""
    return _HAS_MORE_WORDS.search(text) is not None


def symbol_share(text: str) -> float:
    """Share of the characters that are neither letters, digits nor underscores.

    Spaces are not counted, nor what has no place of its own: marks above, below or around a character, joiners.
    """
    counted = len(text) - len(_NOT_COUNTED.findall(text))
    return len(_SYMBOLS.findall(text)) / max(counted, 1)


def sentence_end(text: str, start: int = 0) -> int | None:
    """The place after the first end of a sentence from `start` on; None if none ends.

    A sentence of Thai or Lao ends with a space, of other scripts with a mark.
    """
    found = _SENTENCE_END.search(text, start)
    return None if found is None else int(found.end())
