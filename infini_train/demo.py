"""End-to-end demo, as the commands that a person would type: text, shards, training, evaluation, a sample."""

import json
import logging
import shlex
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from infini_train.atomic_files import replacing, write_atomic
from infini_train.child_processes import run_child
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from infini_train.data.writer import explain_disk_errors
from infini_train.eval.gates import read_gates
from infini_train.regular_files import read_regular

LOG = logging.getLogger(__name__)
MAX_NOTE_BYTES = 2**16
DATA = [sys.executable, "-m", "data_tools"]
TRAIN = [sys.executable, "-m", "infini_train.cli"]
PROMPT = "def "


class CommandError(RuntimeError):
    """A command of the demo failed, and has printed why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def run_demo(text: str | None, out: Path | None, overrides: Sequence[str], verbosity: Sequence[str] = ()) -> int:
    """Runs the demo; returns the exit code of the first command that failed, or 0.

    Args:
        text: corpus for `infini-data`; None: the Python standard library's sources, which every machine has.
        out: folder for everything; None: runs/demo, or runs/demo-NAME for a text of this name.
        overrides: --set assignments for the training config.
        verbosity: --quiet or --verbose, for the commands of `infini-train`.

    Raises:
        ConfigError: a given path does not exist or can't be written, or an override is wrong.
    """
    begin = time.monotonic()
    source = Path(text) if text else Path(sysconfig.get_path("stdlib"))
    if not source.exists():
        raise ConfigError(f"--text: {source}: no such file or folder")
    if out is None:
        out = Path("runs") / (f"demo-{source.resolve().stem}" if text else "demo")
    data, model = out / "data", out / "tokenizer.model"
    fields = {
        "run_dir": str(out),
        "data.train": str(data / "train"),
        "data.validation": str(data / "validation"),
    }
    settings = [*(f"{name}={json.dumps(value)}" for name, value in fields.items()), *overrides]
    config = load_run("demo", settings)
    sets = [word for setting in settings for word in ("--set", setting)]
    chosen = [f"--device={config.device}", *verbosity]
    with explain_disk_errors(out):
        _record_source(source, out)
        corpus = [str(source), "--on-bad-record", "skip"] if text else _standard_library(source, out)
    try:
        if not (data / "train" / "manifest.json").exists():
            vocab = str(config.model.vocab_size)
            _announce("1/5  a tokenizer of this text")
            _run([*DATA, "tokenizer", *corpus, "--vocab-size", vocab, "--out", str(model), "--overwrite"])
            _announce("2/5  shards of token ids, 5 % of the documents held out")
            shards = ["--tokenizer", str(model), "--out", str(data), "--holdout", "0.05", "--overwrite"]
            _run([*DATA, "encode", *corpus, *shards])
        else:
            _announce(f"1/5  2/5  {data} is there already")
        _announce("3/5  training (Ctrl-C saves; the same command resumes)")
        _run([*TRAIN, "train", "demo", *sets, *verbosity])
        _announce("4/5  perplexity of held-out documents, streamed with the memory carried along")
        result = json.loads(_run([*TRAIN, "eval", str(out), "--max-tokens", "100000", "--json", *chosen]))
        _announce("5/5  a sample")
        sample = ["--prompt", PROMPT, "--max-new-tokens", "80", "--ignore-end", *chosen]
        print(_run([*TRAIN, "generate", str(out), *sample]), end="")
    except CommandError as error:
        return error.code
    _summarise(out, config.train.total_steps, result, time.monotonic() - begin)
    return 0


def _record_source(source: Path, out: Path) -> None:
    """Notes the text in the folder; refuses one that holds the demo of another text."""
    out.mkdir(parents=True, exist_ok=True)
    note = out / "source.txt"
    if note.exists():
        noted = read_regular(note, MAX_NOTE_BYTES).decode("utf-8", "replace")
        if noted != str(source.resolve()):
            raise ConfigError(f"--out: {out} holds the demo of {noted}; choose another folder")
    write_atomic(note, str(source.resolve()), durable=False)


def _standard_library(source: Path, out: Path) -> list[str]:
    """Writes the library's sources to one file of documents, without installed packages, tests and tables."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "encodings"}  # encodings: character tables
    folder = out / "text"
    folder.mkdir(exist_ok=True)
    path = folder / "standard_library.jsonl"
    with replacing(path, durable=False) as partial, partial.open("w", encoding="utf-8") as stream:
        for file in sorted(source.rglob("*.py")):
            name = file.relative_to(source)
            if left_out & set(name.parts):
                continue
            try:
                document = {"id": name.as_posix(), "text": file.read_text(encoding="utf-8")}
            except (OSError, UnicodeDecodeError):
                continue  # a dangling link, or one of the few sources in another encoding, for tests
            stream.write(json.dumps(document) + "\n")
    return [str(path)]


def _announce(step: str) -> None:
    LOG.info("\n== %s", step)


def _run(command: list[str]) -> str:
    """Runs a command on this console; the standard output of `eval` and `generate` is returned.

    A signal reaches the command, which saves and exits by itself; this process only waits for it.
    """
    shown = {tuple(DATA): "infini-data", tuple(TRAIN): "infini-train"}[tuple(command[:3])]
    LOG.info("$ %s %s", shown, shlex.join(command[3:]))
    code, printed = run_child(command, capture=command[3] in ("eval", "generate"))
    if code:
        raise CommandError(code)
    return printed


def _summarise(out: Path, steps: int, result: dict[str, float], seconds: float) -> None:
    gates = _last_gates(out / "metrics.jsonl")
    below = result["unigram_entropy"] - result["loss"]
    rows = {
        "held-out loss": f"{result['loss']:.3f} nats a token ({result['bits_per_byte']:.3f} bits a byte)",
        "unigram entropy": f"{result['unigram_entropy']:.3f} nats a token: the model is {below:.3f} below",
        "perplexity": f"{result['perplexity']:.1f} over {result['tokens']:,} tokens",
        "gates": f"0.50 at the start, {gates[0]:.2f} to {gates[1]:.2f} after {steps} steps" if gates else "none",
        "time": f"{seconds / 60:.1f} minutes",
        "checkpoint": result["checkpoint"],
        "shards": str(out / "data"),
        "metrics": str(out / "metrics.jsonl"),
        "TensorBoard": f"tensorboard --logdir {shlex.quote(str(out / 'tensorboard'))}",
    }
    _announce("done")
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    here = shlex.quote(str(out))
    print(
        f"\nnext: infini-train generate {here} --prompt 'class '\n"
        f"      infini-train eval {here} --stream\n"
        f"      infini-train train {shlex.quote(str(out / 'config.yaml'))} --set train.max_steps={2 * steps}\n"
        "      infini-train demo --text YOUR_TEXT --out runs/mine"
    )


def _last_gates(path: Path) -> tuple[float, float] | None:
    try:
        found = read_gates(path.parent)
    except ConfigError:
        return None
    return found[-1]["gates/lowest"], found[-1]["gates/highest"]
