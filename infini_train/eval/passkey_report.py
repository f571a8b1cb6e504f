"""A passkey test of a trained model from its settings to files: answers as they come, then table, picture, scalars."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from infini_train.config.errors import ConfigError
from infini_train.data.passkey import PasskeyWriter
from infini_train.data.passkey_wordings import find_wording
from infini_train.eval.heatmap import plot_recall
from infini_train.eval.intervals import format_share
from infini_train.eval.loading import Trained
from infini_train.eval.passkey import answer_grid
from infini_train.eval.passkey_scores import (
    Answer,
    PasskeyGrid,
    Prompt,
    format_length,
)
from infini_train.eval.records import RecordFile, find_home, hash_checkpoint, save_picture, write_file
from infini_train.eval.scores import Score, score_cells, summarise

ANSWERS, RESULTS, PICTURE = "answers.jsonl", "results.json", "heatmap.png"


def name_kind(grid: PasskeyGrid, precision: str) -> str:
    """The part of a test's name that tells it from the usual one: -harbour-seed1; usually empty."""
    usual = PasskeyGrid(lengths_tokens=(1,), positions=(0.0,))
    kinds = [f"-{grid.wording}"] * (grid.wording != usual.wording)
    kinds += [f"-{grid.digits}digits"] * (grid.digits != usual.digits)
    kinds += [f"-seed{grid.seed}"] * (grid.seed != usual.seed)
    kinds += [f"-{precision}"] * (precision != "fp32")
    return "".join(kinds)


def check_grid(grid: PasskeyGrid, writer: PasskeyWriter) -> None:
    """Whether the prompts fit into the lengths.

    Raises:
        ConfigError: one does not.
    """
    needed, shortest = writer.min_tokens + 1, min(grid.lengths_tokens)
    if shortest < needed:
        what = f"wording {grid.wording} with {grid.digits} digits takes {needed} tokens without any filler"
        raise ConfigError(f"--lengths: {shortest} tokens can't hold the prompt; {what}")


def evaluate_passkey(
    trained: Trained,
    grid: PasskeyGrid,
    *,
    lanes: int,
    out: Path | None = None,
    overwrite: bool = False,
    precision: str = "fp32",
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Answers what is still missing of a grid, writes everything, and returns the results as plain values.

    Args:
        trained: the model, in `precision`.
        grid: which prompts.
        lanes: prompts read side by side.
        out: folder for everything; default: eval/ of the run's folder, and its tensorboard/eval/.
        overwrite: drop the answers that are there.
        precision: of weights and activations.
        say: told a line for every cell that is done.

    Raises:
        ConfigError: the tokenizer or a length does not do, or `out` holds another test.
    """
    writer = PasskeyWriter(trained.tokenizer, find_wording(grid.wording), grid.digits)
    check_grid(grid, writer)
    home, kind = find_home(trained.checkpoint), name_kind(grid, precision)
    folder = out or home / "eval" / f"passkey-{trained.step}{kind}"
    settings = {
        "checkpoint_sha256": hash_checkpoint(trained.checkpoint),
        "wording": grid.wording,
        "digits": grid.digits,
        "seed": grid.seed,
        "precision": precision,
    }
    file = RecordFile(folder / ANSWERS, Answer, settings, overwrite=overwrite)
    _answer_rest(trained, writer, grid, file, lanes, say)
    answers = [answer for answer in file.records if answer.prompt in _all_prompts(grid)]
    segment = trained.config.model.segment_tokens
    results = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        **settings,
        "samples": grid.samples,
        "segment_tokens": segment,
        "folder": str(folder),
        **summarise(grid, answers, segment),
    }
    write_file(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    figure = _draw(grid, answers, f"{home.name}, step {trained.step}")
    save_picture(figure, folder / PICTURE)
    board = (out or home) / "tensorboard" / "eval"
    _write_board(board, f"passkey{kind}", trained.step, score_cells(grid, answers), figure)
    return results


def _all_prompts(grid: PasskeyGrid) -> set[Prompt]:
    return {prompt for length in grid.lengths_tokens for prompt in grid.prompts(length)}


def _answer_rest(
    trained: Trained,
    writer: PasskeyWriter,
    grid: PasskeyGrid,
    file: RecordFile[Answer],
    lanes: int,
    say: Callable[[str], object],
) -> None:
    """Answers the prompts that the file lacks; tells each cell when its last answer is there."""
    wanted = _all_prompts(grid)
    done = {answer.prompt for answer in file.records} & wanted
    if done:
        say(f"{len(done)} of {len(wanted)} answers were there already")
    total = sum(prompt.length_tokens for prompt in wanted - done)
    with tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=None, dynamic_ncols=True) as bar:
        batches = answer_grid(
            trained.model, writer, grid, trained.tokenizer.bos_id, lanes=lanes, done=done, on_progress=bar.update
        )
        for answers in batches:
            file.append(answers)
            scores = score_cells(grid, file.records)
            for cell in dict.fromkeys((answer.length_tokens, answer.position) for answer in answers):
                if scores[cell].samples == grid.samples:
                    with bar.external_write_mode():
                        say(cell_line(*cell, scores[cell]))


def cell_line(length_tokens: int, position: float, score: Score) -> str:
    """What one cell came to, in a line."""
    digits = format_share(score.accuracy, score.interval)
    return (
        f"{format_length(length_tokens):>6} at {position:<5.3g} exact {score.exact}/{score.samples} ="
        f" {format_share(score.exact_match, score.exact_interval)}   digits {digits}"
    )


def format_results(results: dict[str, Any]) -> str:
    """Two tables in percent, a column a length and a row a position, and what was measured beside."""
    cells = {(cell["length_tokens"], cell["position"]): cell for cell in results["cells"]}
    lengths = [length["length_tokens"] for length in results["lengths"]]
    lines = [
        f"{results['checkpoint']}, step {results['step']}",
        f"wording {results['wording']}, {results['digits']} digits, seed {results['seed']},"
        f" {results['samples']} samples a cell; in %, with Wilson's 95 % interval",
    ]
    for title, share in (("exact match", "exact_match"), ("digits", "digit_accuracy")):
        lines += ["", f"{title:<12}" + "".join(f"{format_length(length):>18}" for length in lengths)]
        rows = [(f"{position:.3g}", position) for position in dict.fromkeys(place for _, place in cells)]
        for label, position in rows:
            row = [cells[length, position] for length in lengths]
            lines.append(f"{label:<12}" + "".join(f"{format_share(c[share], c[f'{share}_95']):>18}" for c in row))
        whole = "".join(f"{format_share(c[share], c[f'{share}_95']):>18}" for c in results["lengths"])
        lines.append(f"{'all':<12}{whole}")
    memory = "".join(f"{length['peak_memory_mb']:>18,.0f}" for length in results["lengths"])
    found = results["all"]
    lines += [
        "",
        f"{'peak MB':<12}{memory}",
        f"all: exact {found['exact']}/{found['samples']},"
        f" {format_share(found['exact_match'], found['exact_match_95'])}",
    ]
    if results["segment_tokens"]:
        lines.append(
            f"of {results['segment_tokens']} places in a segment the key began at {results['key_phases']}, the question"
            f" at {results['question_phases']}"
        )
    if results["end_tokens_per_s"]:
        lines.append(
            f"{format_length(lengths[-1])}: {results['start_tokens_per_s']:,.0f} tokens/s at the start,"
            f" {results['end_tokens_per_s']:,.0f} at the end"
        )
    return "\n".join([*lines, f"written to {results['folder']}"])


def _draw(grid: PasskeyGrid, answers: Sequence[Answer], title: str) -> Figure:
    scores = score_cells(grid, answers)
    shape = (len(grid.lengths_tokens), len(grid.positions))
    found = [scores[cell] for cell in grid.cells()]
    share_LP = np.array([score.exact_match for score in found]).reshape(shape)
    interval_LP2 = np.array([score.exact_interval for score in found]).reshape(*shape, 2)
    what = f"exact match of {grid.digits} digits in %, wording {grid.wording}"
    note = f"{what}\nn = {grid.samples} a cell, 95 % interval below"
    lengths, positions = map(format_length, grid.lengths_tokens), (f"{place:.3g}" for place in grid.positions)
    return plot_recall(share_LP, interval_LP2, list(lengths), list(positions), f"{title}\n{note}")


def _write_board(folder: Path, name: str, step: int, scores: dict[tuple[int, float], Score], figure: Figure) -> None:
    # A folder of its own: TensorBoard follows only the newest file of a folder, and training may still be writing.
    with SummaryWriter(str(folder)) as board:
        for (length, position), score in scores.items():
            cell = f"{format_length(length)} at {position:.3g}"
            board.add_scalar(f"eval/{name}/exact match/{cell}", score.exact_match, step)
            board.add_scalar(f"eval/{name}/digits/{cell}", score.accuracy, step)
        board.add_figure(f"eval/{name}/exact match by length and position", figure, step)
