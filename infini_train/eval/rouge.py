"""Summaries against their references: ROUGE (C.-Y. Lin, 2004) by Google's rouge-score. Imports no torch.

Legend: N books, M measures.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infini_train.config.errors import ConfigError

MEASURES = ("rouge1", "rouge2", "rougeL")
DRAWS = 2000  # of the bootstrap


def make_scorer() -> Callable[[str, str], dict[str, float]]:
    """A function from (reference, summary) to F1 of ROUGE-1, ROUGE-2 and ROUGE-L, with Porter's stemmer.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "eval summarise: needs the rouge-score library; install it with: pip install 'infini-train[summarise]'"
        ) from error
    scorer = RougeScorer(list(MEASURES), use_stemmer=True)
    return lambda reference, summary: {
        name: float(score.fmeasure) for name, score in scorer.score(reference, summary).items()
    }


def lead(book: str, sentences: int = 3) -> str:
    """The first sentences of a book: what a summary has to beat."""
    end = 0
    for _ in range(sentences):
        places = [place for mark in ".!?" if (place := book.find(mark, end)) >= 0]
        if not places:
            return book.strip()
        end = min(places) + 1
    return book[:end].strip()


def summarise_scores(scores_NM: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Means of the measures and their geometric mean (the "overall" of arXiv 2404.07143), in percent.

    95 % intervals by bootstrap over books, always with the same draws. Of one book nothing is known beyond itself.
    """
    values_NM = 100 * np.asarray(scores_NM, np.float64)
    books = len(values_NM)
    assert books and values_NM.shape[1] == len(MEASURES)
    chosen = np.random.default_rng(0).integers(0, books, (DRAWS, books))
    drawn = values_NM[chosen].mean(1)
    means = values_NM.mean(0)
    found: dict[str, Any] = {"books": books}
    for column, name in enumerate(MEASURES):
        found[name] = float(means[column])
        found[f"{name}_95"] = np.percentile(drawn[:, column], (2.5, 97.5)).tolist()
    found["overall"] = _geometric_mean(means)
    found["overall_95"] = np.percentile([_geometric_mean(row) for row in drawn], (2.5, 97.5)).tolist()
    return found


def _geometric_mean(values: np.ndarray) -> float:
    return float(math.prod(values.tolist()) ** (1 / len(values)))
