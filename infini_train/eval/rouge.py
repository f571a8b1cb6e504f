"""ROUGE (C.-Y. Lin, 2004) by Google's rouge-score, and the summary that any other has to beat. Imports no torch."""

from collections.abc import Callable

from infini_train.config.errors import ConfigError
from infini_train.data.words import plain_words, sentence_end

MEASURES = ("rouge1", "rouge2", "rougeL")
Scorer = Callable[[str, str], dict[str, float]]


def make_scorer() -> Scorer:
    """A function from (reference, summary) to F1 of ROUGE-1, ROUGE-2 and ROUGE-L.

    ASCII texts get rouge-score's own words, with Porter's stemmer, so their scores compare with published ones. Its
    words have no other letters than a-z; those of other texts are here the words of any script, as `plain_words`.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "eval summarise: needs the rouge-score library; install it with: pip install 'infini-train[summarise]'"
        ) from error
    scorer = RougeScorer(list(MEASURES), tokenizer=_RougeWords())
    return lambda reference, summary: {
        name: float(score.fmeasure) for name, score in scorer.score(reference, summary).items()
    }


class _RougeWords:
    """What rouge-score asks for the words of a text."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.tokenize import tokenize

        self._stemmer, self._ascii_words = PorterStemmer(), tokenize

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return self._ascii_words(text, self._stemmer)
        parts = ((self._ascii_words(word, self._stemmer) if word.isascii() else [word]) for word in plain_words(text))
        return [word for part in parts for word in part]


def lead(book: str, sentences: int = 3) -> str:
    """The first sentences of a book: what a summary has to beat."""
    end = 0
    for _ in range(sentences):
        following = sentence_end(book, end)
        if following is None:
            return book.strip()
        end = following
    return book[:end].strip()
