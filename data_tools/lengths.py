"""Document lengths of datasets: a table, and a plot."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from infini_train.atomic_files import replacing
from infini_train.data.shards import Dataset
from infini_train.data.writer import explain_disk_errors

_LONG_TOKENS = (4096, 32_768, 131_072)
_BAR_CHARS = 40


def read_lengths(folders: Sequence[Path | str]) -> np.ndarray:
    """Tokens of each document.

    Raises:
        ConfigError: as `Dataset.open`.
    """
    return np.concatenate([Dataset.open(folder).lengths_tokens for folder in folders])


def token_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of documents, and of their tokens, by length: entry k for 2^(k-1) to 2^k - 1 tokens, entry 0 for none."""
    exponents = np.frexp(lengths.astype(np.float64))[1]
    return np.bincount(exponents), np.bincount(exponents, lengths).astype(np.int64)


def describe_lengths(lengths: np.ndarray) -> str:
    """The distribution as text."""
    total = max(int(lengths.sum()), 1)
    quantiles = np.quantile(lengths, [0.1, 0.5, 0.9, 0.99], method="nearest")
    lines = [
        f"documents  {lengths.size:,}",
        f"tokens     {int(lengths.sum()):,}",
        f"mean       {lengths.mean():,.1f}",
        *(f"{name:<10} {int(n):,}" for name, n in zip(("10 %", "median", "90 %", "99 %"), quantiles, strict=True)),
        f"longest    {int(lengths.max()):,}",
        "share of the tokens in documents of more than",
        *(f"  {limit // 1024:>4}K tokens  {lengths[lengths > limit].sum() / total:7.1%}" for limit in _LONG_TOKENS),
        f"{'tokens a document':>23}  {'documents':>12}  share of the tokens",
    ]
    for k, (documents, tokens) in enumerate(zip(*token_histogram(lengths), strict=True)):
        if documents:
            low, high = (2 ** (k - 1), 2**k - 1) if k else (0, 0)
            bar = "#" * round(_BAR_CHARS * tokens / total)
            lines.append(f"{f'{low:,} to {high:,}':>23}  {documents:>12,}  {tokens / total:6.1%} {bar}")
    return "\n".join(lines)


def plot_lengths(lengths: np.ndarray, path: Path | str) -> None:
    """A PNG of the distribution: documents, and share of the tokens, by length.

    Raises:
        ConfigError: it can't be written.
    """
    from matplotlib.figure import Figure

    documents, tokens = token_histogram(lengths)
    edges = np.concatenate([[0.5], 2.0 ** np.arange(len(documents))])
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, heights, label in (
        (upper, documents, "documents"),
        (lower, 100 * tokens / max(int(tokens.sum()), 1), "tokens (%)"),
    ):
        axes.stairs(heights, edges, fill=True, alpha=0.7)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        for limit in _LONG_TOKENS:
            axes.axvline(limit, color="black", linestyle=":", linewidth=1)
    lower.set_xscale("log", base=2)
    lower.set_xlabel("tokens a document (dotted: 4K, 32K, 128K)")
    with explain_disk_errors(Path(path).parent):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as partial:
            figure.savefig(partial, format="png")
