"""A needle test of a trained model from its settings to files: answers as they come, then table, picture, scalars."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from infini_train.data.haystack import HAYSTACKS
from infini_train.data.needles import ONE_ASKED
from infini_train.eval.heatmap import plot_recall
from infini_train.eval.intervals import format_share
from infini_train.eval.loading import Trained
from infini_train.eval.needle_scores import NeedleAnswer, NeedleCell, NeedleGrid, NeedlePrompt
from infini_train.eval.needles import NeedlePrompts, answer_needles
from infini_train.eval.passkey_scores import format_length
from infini_train.eval.reading import segment_of
from infini_train.eval.records import RecordFile, find_home, hash_checkpoint, save_picture, write_file
from infini_train.eval.scores import Score, score_cells, summarise

ANSWERS, RESULTS, PICTURE = "answers.jsonl", "results.json", "heatmap.png"


def name_test(grid: NeedleGrid, precision: str) -> str:
    """Of the test's folder, behind the step: multikey-varied, multikey-prose-seed1."""
    hay = grid.haystack if grid.haystack in HAYSTACKS else "prose"
    usual = NeedleGrid(task=grid.task, lengths_tokens=(1,))
    kinds = [f"-{grid.digits}digits"] * (grid.digits != usual.digits)
    kinds += [f"-seed{grid.seed}"] * (grid.seed != usual.seed)
    kinds += [f"-{precision}"] * (precision != "fp32")
    return f"{grid.task}-{hay}{''.join(kinds)}"


def evaluate_needles(
    trained: Trained,
    grid: NeedleGrid,
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
        ConfigError: the tokenizer, the haystack or a length does not do, or `out` holds another test.
    """
    prompts = NeedlePrompts(grid, trained.tokenizer, segment_of(trained.model))
    home, name = find_home(trained.checkpoint), name_test(grid, precision)
    folder = out or home / "eval" / f"needles-{trained.step}-{name}"
    is_prose = grid.haystack not in HAYSTACKS
    settings = {
        "checkpoint_sha256": hash_checkpoint(trained.checkpoint),
        "task": grid.task,
        "haystack": "prose" if is_prose else grid.haystack,
        "haystack_sha256": hashlib.sha256(Path(grid.haystack).read_bytes()).hexdigest() if is_prose else None,
        "digits": grid.digits,
        "seed": grid.seed,
        "precision": precision,
    }
    file = RecordFile(folder / ANSWERS, NeedleAnswer, settings, overwrite=overwrite)
    if prompts.source.prose_tokens is not None and prompts.source.prose_tokens < max(grid.lengths_tokens):
        say(f"the haystack has {prompts.source.prose_tokens:,} tokens; longer prompts meet parts of it again")
    _answer_rest(trained, prompts, file, lanes, say)
    answers = [answer for answer in file.records if answer.prompt in _all_prompts(grid)]
    segment = trained.config.model.segment_tokens
    results = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        **settings,
        "samples": grid.samples,
        "segment_tokens": segment,
        "folder": str(folder),
        **summarise(grid, answers, segment, "word", ()),
    }
    write_file(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    figure = _draw(grid, answers, f"{home.name}, step {trained.step}")
    save_picture(figure, folder / PICTURE)
    board = (out or home) / "tensorboard" / "eval"
    _write_board(board, f"needles-{name}", trained.step, score_cells(grid, answers), figure)
    return results


def _all_prompts(grid: NeedleGrid) -> set[NeedlePrompt]:
    return {prompt for length in grid.lengths_tokens for prompt in grid.prompts(length)}


def _answer_rest(
    trained: Trained,
    prompts: NeedlePrompts,
    file: RecordFile[NeedleAnswer],
    lanes: int,
    say: Callable[[str], object],
) -> None:
    """Answers the prompts that the file lacks; tells each cell when its last answer is there."""
    grid = prompts.grid
    wanted = _all_prompts(grid)
    done = {answer.prompt for answer in file.records} & wanted
    if done:
        say(f"{len(done)} of {len(wanted)} answers were there already")
    total = sum(prompt.length_tokens for prompt in wanted - done)
    with tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=None, dynamic_ncols=True) as bar:
        for answers in answer_needles(trained.model, prompts, lanes=lanes, done=done, on_progress=bar.update):
            file.append(answers)
            scores = score_cells(grid, file.records)
            for cell in dict.fromkeys(answer.cell for answer in answers):
                if scores[cell].samples == grid.samples:
                    with bar.external_write_mode():
                        say(cell_line(grid, cell, scores[cell]))


def cell_line(grid: NeedleGrid, cell: NeedleCell, score: Score) -> str:
    """What one cell came to, in a line."""
    return (
        f"{format_length(cell.length_tokens):>6} {_name_column(grid, cell.needles, cell.depth):<16} exact"
        f" {score.exact}/{score.samples} = {format_share(score.exact_match, score.exact_interval)}"
        f"   words {format_share(score.accuracy, score.interval)}"
    )


def _name_column(grid: NeedleGrid, needles: int, depth: float) -> str:
    """Of one length: 4 at 0.5; 4 where all of them matter."""
    return f"{needles} at {depth:.3g}" if grid.task in ONE_ASKED else f"{needles}"


def format_results(grid: NeedleGrid, results: dict[str, Any]) -> str:
    """Two tables in percent, a column a length and a row a number of needles and depth."""
    cells = {(cell["length_tokens"], cell["needles"], cell["depth"]): cell for cell in results["cells"]}
    lengths = [length["length_tokens"] for length in results["lengths"]]
    lines = [
        f"{results['checkpoint']}, step {results['step']}",
        f"{grid.task} in {results['haystack']} hay, {grid.digits} digits, seed {grid.seed}, {grid.samples} samples a"
        " cell; in %, with Wilson's 95 % interval",
    ]
    for title, share in (("all words right", "exact_match"), ("words", "word_accuracy")):
        lines += ["", f"{title:<16}" + "".join(f"{format_length(length):>18}" for length in lengths)]
        rows = [
            (_name_column(grid, *column), [cells[(length, *column)] for length in lengths]) for column in grid.columns()
        ]
        rows.append(("all", results["lengths"]))
        for label, row in rows:
            lines.append(f"{label:<16}" + "".join(f"{format_share(c[share], c[f'{share}_95']):>18}" for c in row))
    memory = "".join(f"{length['peak_memory_mb']:>18,.0f}" for length in results["lengths"])
    return "\n".join([*lines, "", f"{'peak MB':<16}{memory}", f"written to {results['folder']}"])


def _draw(grid: NeedleGrid, answers: Sequence[NeedleAnswer], title: str) -> Figure:
    scores, columns = score_cells(grid, answers), grid.columns()
    found = [scores[cell] for cell in grid.cells()]
    shape = (len(grid.lengths_tokens), len(columns))
    share_LP = np.array([score.accuracy for score in found]).reshape(shape)
    interval_LP2 = np.array([score.interval for score in found]).reshape(*shape, 2)
    hay = grid.haystack if grid.haystack in HAYSTACKS else "prose"
    note = f"{grid.task} in {hay} hay: right words in %\nn = {grid.samples} prompts a cell, 95 % interval below"
    lengths, names = map(format_length, grid.lengths_tokens), (_name_column(grid, *column) for column in columns)
    axis = "needles at the depth of the asked one" if grid.task in ONE_ASKED else "needles"
    return plot_recall(share_LP, interval_LP2, list(lengths), list(names), f"{title}\n{note}", axis)


def _write_board(folder: Path, name: str, step: int, scores: dict[NeedleCell, Score], figure: Figure) -> None:
    with SummaryWriter(str(folder)) as board:
        for cell, score in scores.items():
            place = f"{format_length(cell.length_tokens)}, {cell.needles} at {cell.depth:.3g}"
            board.add_scalar(f"eval/{name}/exact match/{place}", score.exact_match, step)
            board.add_scalar(f"eval/{name}/words/{place}", score.accuracy, step)
        board.add_figure(f"eval/{name}/words by length and needles", figure, step)
