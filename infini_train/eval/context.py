"""`infini-train eval context`: how the loss of whole documents falls with context. Imports torch late."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infini_train.command_line import DIR, describe, format_length, parse_length, positive, seed
from infini_train.config.errors import ConfigError
from infini_train.data.shards import Dataset
from infini_train.eval.context_losses import ContextPlan, DocumentLosses, bucket_edges, measure_document
from infini_train.eval.measurement import Measurement, add_model, add_out, run
from infini_train.eval.validation import open_data
from infini_train.statistics import bootstrap_ratio

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from infini_train.inference.loading import Trained

CONTEXTS = ("256", "1K", "4K")
PICTURE = "context.png"
EXAMPLES = """\
examples:
  infini-train eval context runs/books                       the run's validation data
  infini-train eval context runs/books --data data/books/validation --contexts 256 1K 4K 16K --targets 16
  infini-train eval context runs/books --documents 10 --json

Stopped by Ctrl-C? The same command resumes with the next document. More documents add to what is there.
"""


class ContextTest(Measurement[DocumentLosses]):
    """Losses of whole documents, by position and by visible context.

    Args:
        trained: the model.
        plan: which contexts and targets.
        data: folder or URL of shards; None: the run's validation data.
        max_documents: how many of the first ones; None: all.

    Raises:
        ConfigError: the data do not do, or no document is long enough.
    """

    file, record = "documents.jsonl", DocumentLosses

    def __init__(
        self, trained: "Trained", plan: ContextPlan, *, data: str | None = None, max_documents: int | None = None
    ) -> None:
        folder, self.dataset = open_data(trained, data)
        self.documents = range(min(len(self.dataset), max_documents or len(self.dataset)))
        self.targets = plan
        _check_lengths(self.dataset, self.documents, plan)
        settings = {
            "data_sha256": self.dataset.manifest.documents_sha256,
            "contexts_tokens": list(plan.contexts_tokens),
            "targets": plan.targets,
            "target_tokens": plan.target_tokens,
            "seed": plan.seed,
        }
        super().__init__(trained, "context", "" if trained.precision == "fp32" else f"-{trained.precision}", settings)
        self.about = {"data": folder, "segment_tokens": trained.config.model.segment_tokens}

    def _missing(self, records: Sequence[DocumentLosses]) -> list[int]:
        done = {record.document for record in records}
        return [document for document in self.documents if document not in done]

    def plan(self, records: Sequence[DocumentLosses]) -> tuple[list[str], int | None]:
        plan, dataset, missing = self.targets, self.dataset, self._missing(records)
        there = len(self.documents) - len(missing)
        again = plan.targets * (sum(plan.contexts_tokens) + len(plan.contexts_tokens) * plan.target_tokens)
        total = sum(int(dataset.lengths_tokens[d]) + 1 + again * bool(_targets(plan, dataset, d)) for d in missing)
        return [f"{there} of {len(self.documents)} documents were there already"] if there else [], total

    def measure(
        self, records: Sequence[DocumentLosses], on_progress: Callable[[int], object]
    ) -> Iterator[Sequence[DocumentLosses]]:
        for document in self._missing(records):
            yield [measure_document(self.trained.model, self.dataset, document, self.targets, on_progress=on_progress)]

    def describe(self, batch: Sequence[DocumentLosses], records: Sequence[DocumentLosses]) -> Iterator[str]:
        yield from (_document_line(record, self.targets) for record in batch)

    def summarise(self, records: Sequence[DocumentLosses]) -> dict[str, Any]:
        return summarise([record for record in records if record.document in self.documents], self.targets)

    def write(
        self, records: Sequence[DocumentLosses], results: dict[str, Any], folder: Path, board: "SummaryWriter"
    ) -> None:
        from infini_train.eval.records import save_picture
        from infini_train.plots import plot_context_losses

        step = self.trained.step
        figure = plot_context_losses(results, self.title)
        save_picture(figure, folder / PICTURE)
        for row in results["positions"]:
            board.add_scalar(f"eval/context/loss by position/{row['first_position']}", row["loss"], step)
        for row in results["contexts"]:
            name = "all" if row["context_tokens"] is None else format_length(row["context_tokens"])
            board.add_scalar(f"eval/context/loss by context/{name}", row["loss"], step)
        board.add_figure("eval/context/by position and by context", figure, step)

    def format(self, results: dict[str, Any]) -> str:
        whole = results["whole"]
        lines = [
            f"{results['checkpoint']}, step {results['step']}",
            f"{results['documents']} documents, {whole['tokens']:,} tokens: loss {whole['loss']:.4f} nats a token,"
            f" perplexity {whole['perplexity']:.2f}; 95 % intervals by bootstrap over documents",
            "",
            f"{'tokens before':>22}{'documents':>11}{'tokens':>12}{'loss':>9}{'95 %':>19}{'perplexity':>12}",
        ]
        for row in results["positions"]:
            name = f"{row['first_position']:,} to {row['end_position'] - 1:,}"
            lines.append(f"{name:>22}{row['documents']:>11,}{row['tokens']:>12,}" + _loss_columns(row))
        if results["contexts"]:
            head = f"{'visible before':>22}{'documents':>11}{'tokens':>12}{'loss':>9}{'95 %':>19}{'perplexity':>12}"
            lines += ["", head + f"{'above all':>11}{'95 %':>19}"]
        for row in results["contexts"]:
            name = "all" if row["context_tokens"] is None else f"{row['context_tokens']:,}"
            low, high = row["above_all_95"]
            gap = f"{row['above_all']:>11.4f}{f'{low:.4f} to {high:.4f}':>19}" if row["context_tokens"] else ""
            lines.append(
                f"{name:>22}{results['documents_with_targets']:>11,}{row['tokens']:>12,}{_loss_columns(row)}{gap}"
            )
        if results["damaged_documents"]:
            lines += ["", f"damaged documents, left out: {results['damaged_documents']}"]
        return "\n".join([*lines, "", f"peak MB {results['peak_memory_mb']:,.0f}", f"written to {results['folder']}"])


def _check_lengths(dataset: Dataset, documents: Sequence[int], plan: ContextPlan) -> None:
    longest, needed = max(int(dataset.lengths_tokens[d]) for d in documents), max(plan.contexts_tokens)
    if longest + 1 < needed + plan.target_tokens:
        most = longest + 1 - plan.target_tokens
        advice = f"use at most {most}" if most > 0 else "use other --data, or fewer --target-tokens"
        raise ConfigError(f"--contexts: {needed}: the longest document has {longest:,} tokens; {advice}")


def _targets(plan: ContextPlan, dataset: Dataset, document: int) -> list[int]:
    return plan.place_targets(document, int(dataset.lengths_tokens[document]))


def _document_line(record: DocumentLosses, plan: ContextPlan) -> str:
    head = f"{record.document:>6} {record.name[:32]:<32} {record.tokens:>10,} tokens"
    if record.is_damaged:
        return f"{head}  damaged, left out"
    line = f"{head}  loss {sum(record.bucket_losses) / sum(record.bucket_tokens):.4f}"
    if not record.target_losses:
        return f"{line}  too short for the largest context"
    losses = np.sum(record.target_losses, axis=0) / (len(record.target_losses) * plan.target_tokens)
    shown = [*map(format_length, plan.contexts_tokens), "all"]
    return f"{line}  with " + ", ".join(f"{name} {loss:.4f}" for name, loss in zip(shown, losses, strict=True))


def summarise(records: Sequence[DocumentLosses], plan: ContextPlan) -> dict[str, Any]:
    """Loss by position and by context with 95 % intervals (bootstrap over documents), as plain values.

    Args:
        records: of the documents.
        plan: under which they were measured.
    """
    whole = [record for record in records if not record.is_damaged]
    if not whole:
        raise ConfigError("--data: no document can be read; try infini-data verify")
    edges = bucket_edges(max(record.tokens for record in whole))
    positions = []
    for bucket, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        reach = [r for r in whole if len(r.bucket_tokens) > bucket and r.bucket_tokens[bucket]]
        row = _mean([r.bucket_losses[bucket] for r in reach], [r.bucket_tokens[bucket] for r in reach])
        positions.append({"first_position": first, "end_position": end, "documents": len(reach), **row})
    long = [record for record in whole if record.target_losses]
    sums = np.array([np.sum(record.target_losses, axis=0) for record in long]).reshape(len(long), -1)
    sizes = [len(record.target_losses) * plan.target_tokens for record in long]
    contexts = []
    for column, context in enumerate([*plan.contexts_tokens, None] if long else []):
        gap_low, gap_high = bootstrap_ratio(sums[:, column] - sums[:, -1], sizes)
        contexts.append(
            {
                "context_tokens": context,  # None: all
                **_mean(sums[:, column], sizes),
                "above_all": float((sums[:, column] - sums[:, -1]).sum() / sum(sizes)),
                "above_all_95": [gap_low, gap_high],
            }
        )
    return {
        "documents": len(whole),
        "damaged_documents": len(records) - len(whole),
        "documents_with_targets": len(long),
        "whole": _mean([sum(r.bucket_losses) for r in whole], [sum(r.bucket_tokens) for r in whole]),
        "positions": positions,
        "contexts": contexts,
        "peak_memory_mb": max(record.peak_memory_bytes for record in whole) / 2**20,
    }


def _mean(losses: Sequence[float] | np.ndarray, tokens: Sequence[int]) -> dict[str, Any]:
    loss = float(np.sum(losses) / np.sum(tokens))
    low, high = bootstrap_ratio(np.asarray(losses), tokens)
    return {"tokens": int(np.sum(tokens)), "loss": loss, "loss_95": [low, high], "perplexity": math.exp(min(loss, 700))}


def _loss_columns(row: dict[str, Any]) -> str:
    low, high = row["loss_95"]
    return f"{row['loss']:>9.4f}{f'{low:.4f} to {high:.4f}':>19}{row['perplexity']:>12.2f}"


# ------------------------------------------------------------------------------------------------------------- command


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval context` its options."""
    description = (
        "Measure loss and perplexity over whole documents, streamed in constant memory: by tokens since the document's"
        " start, and, for a sample of targets, by how many tokens before them are visible (what is older is forgotten)."
        " 95 % intervals by bootstrap over documents."
    )
    describe(parser, description, EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--data",
        **DIR,
        help="folder written by infini-data encode (default: the run's validation data)",
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        default=CONTEXTS,
        metavar="N",
        help=f"numbers of tokens visible before a target; K is 1024, M is 1024 K (default: {' '.join(CONTEXTS)})",
    )
    parser.add_argument(
        "--targets",
        type=positive,
        default=8,
        metavar="N",
        help="number of targets in each document that is long enough (default: %(default)s)",
    )
    parser.add_argument(
        "--target-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="number of tokens of a target (default: %(default)s)",
    )
    parser.add_argument(
        "--documents", type=positive, metavar="N", help="read only the first N documents (default: all)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="random seed of the targets' places (default: %(default)s)"
    )
    add_out(parser, "eval/context-STEP", "what is there")
    parser.set_defaults(command=_context)


def _context(options: argparse.Namespace) -> None:
    plan = ContextPlan(
        contexts_tokens=tuple(parse_length(text, "--contexts") for text in options.contexts),
        targets=options.targets,
        target_tokens=options.target_tokens,
        seed=options.seed,
    )
    data, documents = options.data, options.documents
    run(options, lambda trained: ContextTest(trained, plan, data=data, max_documents=documents))
