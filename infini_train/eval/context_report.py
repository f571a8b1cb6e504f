"""A measurement of context from its settings to files: documents as they come, then table, picture, scalars."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from infini_train.config.errors import ConfigError
from infini_train.data.shards import Dataset
from infini_train.eval.context import ContextPlan, DocumentLosses, bucket_edges, measure_document
from infini_train.eval.curves import plot_context
from infini_train.eval.intervals import bootstrap_ratio
from infini_train.eval.loading import Trained
from infini_train.eval.passkey_scores import format_length
from infini_train.eval.records import RecordFile, find_home, hash_checkpoint, save_picture, write_file
from infini_train.eval.report import open_data

DOCUMENTS, RESULTS, PICTURE = "documents.jsonl", "results.json", "context.png"


def evaluate_context(
    trained: Trained,
    plan: ContextPlan,
    *,
    data: str | None = None,
    max_documents: int | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    precision: str = "fp32",
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measures the documents that are still missing, writes everything, and returns the results as plain values.

    Args:
        trained: the model, in `precision`.
        plan: which contexts and targets.
        data: folder or URL of shards; None: the run's validation data.
        max_documents: the first so many; None: all.
        out: folder for everything; default: eval/ of the run's folder, and its tensorboard/eval/.
        overwrite: drop what is there.
        precision: of weights and activations.
        say: told a line for every document that is done.

    Raises:
        ConfigError: the data do not do, no document is long enough, or `out` holds another measurement.
    """
    folder, dataset = open_data(trained, data)
    documents = range(min(len(dataset), max_documents or len(dataset)))
    _check_lengths(dataset, documents, plan)
    home = find_home(trained.checkpoint)
    place = out or home / "eval" / f"context-{trained.step}{'' if precision == 'fp32' else f'-{precision}'}"
    settings = {
        "checkpoint_sha256": hash_checkpoint(trained.checkpoint),
        "data_sha256": dataset.identity,
        "contexts_tokens": list(plan.contexts_tokens),
        "targets": plan.targets,
        "target_tokens": plan.target_tokens,
        "seed": plan.seed,
        "precision": precision,
    }
    file = RecordFile(place / DOCUMENTS, DocumentLosses, settings, overwrite=overwrite)
    _measure_rest(trained, dataset, documents, plan, file, say)
    found = [record for record in file.records if record.document in documents]
    results = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "data": folder,
        **settings,
        "segment_tokens": trained.config.model.segment_tokens,
        "folder": str(place),
        **summarise(found, plan),
    }
    write_file(place / RESULTS, json.dumps(results, indent=1) + "\n")
    figure = plot_context(results, f"{home.name}, step {trained.step}")
    save_picture(figure, place / PICTURE)
    _write_board((out or home) / "tensorboard" / "eval", trained.step, results, figure)
    return results


def _check_lengths(dataset: Dataset, documents: Sequence[int], plan: ContextPlan) -> None:
    longest, needed = max(int(dataset.lengths_tokens[d]) for d in documents), max(plan.contexts_tokens)
    if longest + 1 < needed + plan.target_tokens:
        most = longest + 1 - plan.target_tokens
        advice = f"use at most {most}" if most > 0 else "use other --data, or fewer --target-tokens"
        raise ConfigError(f"--contexts: {needed}: the longest document has {longest:,} tokens; {advice}")


def _measure_rest(
    trained: Trained,
    dataset: Dataset,
    documents: Sequence[int],
    plan: ContextPlan,
    file: RecordFile[DocumentLosses],
    say: Callable[[str], object],
) -> None:
    done = {record.document for record in file.records}
    missing = [document for document in documents if document not in done]
    if len(missing) < len(documents):
        say(f"{len(documents) - len(missing)} of {len(documents)} documents were there already")
    again = plan.targets * (sum(plan.contexts_tokens) + len(plan.contexts_tokens) * plan.target_tokens)
    total = sum(int(dataset.lengths_tokens[d]) + 1 + again * bool(_targets(plan, dataset, d)) for d in missing)
    with tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=None, dynamic_ncols=True) as bar:
        for document in missing:
            record = measure_document(trained.model, dataset, document, plan, on_progress=bar.update)
            file.append([record])
            with bar.external_write_mode():
                say(_document_line(record, plan))


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


def format_results(results: dict[str, Any]) -> str:
    """Two tables: by position, by context."""
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
        lines.append(f"{name:>22}{results['documents_with_targets']:>11,}{row['tokens']:>12,}{_loss_columns(row)}{gap}")
    if results["damaged_documents"]:
        lines += ["", f"damaged documents, left out: {results['damaged_documents']}"]
    return "\n".join([*lines, "", f"peak MB {results['peak_memory_mb']:,.0f}", f"written to {results['folder']}"])


def _loss_columns(row: dict[str, Any]) -> str:
    low, high = row["loss_95"]
    return f"{row['loss']:>9.4f}{f'{low:.4f} to {high:.4f}':>19}{row['perplexity']:>12.2f}"


def _write_board(folder: Path, step: int, results: dict[str, Any], figure: Figure) -> None:
    with SummaryWriter(str(folder)) as board:
        for row in results["positions"]:
            board.add_scalar(f"eval/context/loss by position/{row['first_position']}", row["loss"], step)
        for row in results["contexts"]:
            name = "all" if row["context_tokens"] is None else format_length(row["context_tokens"])
            board.add_scalar(f"eval/context/loss by context/{name}", row["loss"], step)
        board.add_figure("eval/context/by position and by context", figure, step)
