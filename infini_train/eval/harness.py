"""`infini-train eval harness`: local tasks of lm-evaluation-harness, its own results as files, table and scalars.

Imports torch late.
"""

import argparse
import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infini_train.command_line import Spinner, describe, location, non_negative, path, positive, seed
from infini_train.config.errors import ConfigError
from infini_train.data.shard_file import strict_json
from infini_train.eval.measurement import add_lanes, add_model, add_out, load

if TYPE_CHECKING:
    from infini_train.inference.loading import Trained

EXAMPLES = """\
examples:
  infini-train eval harness runs/demo --include-path tasks --tasks my_questions my_texts
  infini-train eval harness runs/demo --tasks tasks/my_questions.yaml --limit 20 --lanes 16

Tasks are files of lm-evaluation-harness on this machine; nothing is downloaded. Relative paths in a task file begin at
--include-path.
"""


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """Which tasks, and how much of them."""

    tasks: tuple[str, ...]  # names of tasks, groups or tags, or .yaml files
    include_path: Path | None = None  # of the task files; their relative paths begin there; None: where the first lies
    num_fewshot: int | None = None  # None: what each task says
    limit: int | None = None  # documents of each task
    seed: int = 0  # of sampled generations

    def folder(self) -> Path:
        """Where the tasks are looked for, absolute.

        Raises:
            ConfigError: no such folder, or none is named.
        """
        files = [Path(name) for name in self.tasks if name.endswith((".yaml", ".yml"))]
        found = self.include_path or (files[0].parent if files else None)
        if found is None:
            raise ConfigError("--include-path: name the folder of the task files, or give a .yaml file as --tasks")
        if not found.is_dir():
            raise ConfigError(f"--include-path: {found} is not a folder")
        return found.resolve()

    def names(self) -> list[str]:
        """The tasks, files by their absolute paths."""
        return [str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name for name in self.tasks]


def _go_offline() -> None:
    """From here on the hub's libraries use what is on this machine, or fail at once."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ[name] = "1"
    try:
        import datasets
        import huggingface_hub.constants
        import lm_eval  # noqa: F401 (whether it is installed)
    except ImportError as error:
        raise ConfigError(
            "eval harness: needs lm-evaluation-harness; install it with: pip install 'infini-train[harness]'"
        ) from error
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # they may have been imported before
    datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it names every default that a task file leaves open


def evaluate_harness(trained: "Trained", task: HarnessTask, *, lanes: int, out: Path | None = None) -> dict[str, Any]:
    """Runs the tasks, writes results.json and a samples_TASK.jsonl each as lm_eval would, and returns the results.

    Args:
        trained: the model.
        task: which tasks.
        lanes: texts read side by side.
        out: folder for everything; default: eval/ of the run's folder, and its tensorboard/eval/.

    Raises:
        ConfigError: lm_eval is not installed, a task is unknown, broken, or needs the network.
    """
    with Spinner("loading lm-evaluation-harness"):
        _go_offline()
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from infini_train.atomic_files import write_atomic
    from infini_train.eval.harness_model import InfiniLM
    from infini_train.eval.records import find_home, hash_checkpoint

    folder = task.folder()
    home = find_home(trained.checkpoint)
    target = (out or home / "eval" / f"harness-{trained.step}").resolve()
    about = {
        "checkpoint_sha256": hash_checkpoint(trained.checkpoint),
        "step": trained.step,
        "precision": trained.precision,
        "model_parameters": sum(weight.numel() for weight in trained.model.parameters()),
    }
    names = task.names()
    board = (out or home).resolve() / "tensorboard" / "eval"
    with Spinner("loading tasks"):
        manager = _load_tasks(names, folder)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm_eval would fork this process, threads and all, which may hang
    with contextlib.chdir(folder):
        results = simple_evaluate(
            model=InfiniLM(trained.model, trained.tokenizer, lanes=lanes, seed=task.seed, end_ids=trained.end_ids),
            tasks=list(names),
            num_fewshot=task.num_fewshot,
            limit=task.limit,
            task_manager=manager,
            batch_size=lanes,
            bootstrap_iters=1000,
        )
    assert results is not None
    samples = results.pop("samples")
    results["config"].update(about)

    def plain(tree: Any) -> Any:
        return json.loads(json.dumps(tree, default=handle_non_serializable))

    target.mkdir(parents=True, exist_ok=True)
    for name, rows in samples.items():
        lines = (json.dumps(strict_json(plain(row)), ensure_ascii=False) + "\n" for row in rows)
        file_name = re.sub(r"[^\w.-]", "_", name)
        write_atomic(target / f"samples_{file_name}.jsonl", "".join(lines))
    write_atomic(target / "results.json", json.dumps(strict_json(plain(results)), indent=2, ensure_ascii=False) + "\n")
    _write_board(board, trained.step, results)
    return {**plain(results), "folder": str(target)}


def _load_tasks(names: Sequence[str], folder: Path) -> Any:
    """lm_eval's manager of the tasks in a folder, with these loaded."""
    from lm_eval.tasks import TaskManager

    with contextlib.chdir(folder), _explained(names):  # data files of a task are named from there
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        _check_names(names, manager.all_tasks, folder)
        manager.load(names)
    return manager


def _check_names(names: Sequence[str], known: Sequence[str], folder: Path) -> None:
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise ConfigError(f"--tasks: no file {name}")
        elif name not in known and "*" not in name:
            there = ", ".join(sorted(known)) or "none"
            raise ConfigError(
                f"--tasks: {name} is not among the task files in {folder} ({there}); nothing is downloaded: put its"
                " .yaml and its data there"
            )


@contextlib.contextmanager
def _explained(names: Sequence[str]) -> Iterator[None]:
    """Turns whatever goes wrong while tasks are loaded into one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever a task file leads datasets, yaml and lm_eval to
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = isinstance(error, ConnectionError) or re.search(r"offline|[Hh]ub|resolve|connect", str(error))
        advice = "nothing is downloaded: put the data on this machine and name them in the task file" if offline else ""
        raise ConfigError(
            f"--tasks: {', '.join(names)} can't be loaded: {said}{f'; {advice}' if advice else ''}"
        ) from error


def format_results(results: dict[str, Any]) -> str:
    """A line for each measure of each task and group."""
    rows = [("task", "n-shot", "filter", "measure", "value", "stderr")]
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            measure, _, filtered = key.partition(",")
            if isinstance(value, float) and not measure.endswith("_stderr"):
                error = values.get(f"{measure}_stderr,{filtered}")
                shown = f"{error:.4f}" if isinstance(error, float) else "-"
                shots = str(results.get("n-shot", {}).get(name, "-"))
                rows.append((name, shots, filtered, measure, f"{value:,.4f}", shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if place > 3 else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, f"written to {results['folder']}"])


def _write_board(folder: Path, step: int, results: dict[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    # A folder of its own: TensorBoard follows only the newest file of a folder, and training may still be writing.
    with SummaryWriter(str(folder)) as board:
        for name, values in results["results"].items():
            for measure, value in values.items():
                if isinstance(value, float) and "_stderr" not in measure:
                    board.add_scalar(f"eval/harness/{name}/{measure.removesuffix(',none')}", value, step)


# ------------------------------------------------------------------------------------------------------------- command


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval harness` its options."""
    description = (
        "Run local tasks of lm-evaluation-harness: questions, likelihoods of texts, generations. Contexts and texts of"
        " any length are read whole, in constant memory."
    )
    describe(parser, description, EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=location,
        required=True,
        metavar="TASK",
        help="names of tasks, groups or tags, or .yaml files",
    )
    parser.add_argument(
        "--include-path", type=path, metavar="DIR", help="folder of the task files (default: that of a .yaml file)"
    )
    parser.add_argument(
        "--num-fewshot",
        type=non_negative,
        metavar="N",
        help="number of examples before a question (default: the task's)",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="use only the first N documents of each task (default: all)"
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="random seed of sampled generations (default: %(default)s)",
    )
    add_lanes(parser, "texts")
    add_out(parser, "eval/harness-STEP")
    parser.set_defaults(command=_harness)


def _harness(options: argparse.Namespace) -> None:
    task = HarnessTask(
        tasks=tuple(options.tasks),
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        seed=options.seed,
    )
    from infini_train.inference.growth import warn_of_growth

    task.folder()  # complains now
    trained = load(options)
    warn_of_growth(trained.config.model, trained.precision)
    results = evaluate_harness(trained, task, lanes=options.lanes, out=options.out)
    print(json.dumps(strict_json(results)) if options.json else format_results(results))
