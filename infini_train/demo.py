"""The whole road once, as the commands that a person would type: text, shards, training, evaluation, a sample."""

import json
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from infini_train.config import ConfigError, load_run

DATA = [sys.executable, "-m", "data_tools"]
TRAIN = [sys.executable, "-m", "infini_train.cli"]
PROMPT = "def "


class CommandError(RuntimeError):
    """A command of the demo failed; it has printed why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def run_demo(text: str | None, out: Path, overrides: Sequence[str]) -> int:
    """Runs the demo; returns the exit code of the first command that failed, or 0.

    Args:
        text: corpus for `infini-data`; None takes the Python standard library's sources, which every machine has.
        out: folder for everything.
        overrides: --set assignments for the training config.

    Raises:
        ConfigError: a given path does not exist, or an override is wrong.
    """
    begin = time.monotonic()
    source = Path(text) if text else Path(sysconfig.get_path("stdlib"))
    if not source.exists():
        raise ConfigError(f"--text: {source}: no such file or folder")
    data, model = out / "data", out / "tokenizer.model"
    fields = {
        "run_dir": str(out),
        "data.train": str(data / "train"),
        "data.validation": str(data / "validation"),
    }
    settings = [*(f"{name}={json.dumps(value)}" for name, value in fields.items()), *overrides]
    config = load_run("demo", settings)
    sets = [word for setting in settings for word in ("--set", setting)]
    try:
        if not (data / "train" / "manifest.json").exists():
            corpus = _corpus(source, text is None, out)
            vocab = str(config.model.vocab_size)
            _say("1/5  a tokenizer of this text")
            _run([*DATA, "tokenizer", *corpus, "--vocab-size", vocab, "--out", str(model), "--overwrite"])
            _say("2/5  shards of token ids, 5 % of the documents held out")
            shards = ["--tokenizer", str(model), "--out", str(data), "--holdout", "0.05", "--overwrite"]
            _run([*DATA, "encode", *corpus, *shards])
        else:
            _say(f"1/5  2/5  {data} is there already")
        _say("3/5  training (Ctrl-C saves; the same command goes on)")
        _run([*TRAIN, "train", "demo", *sets])
        _say("4/5  perplexity of held-out documents, streamed with the memory carried along")
        result = _evaluate(out)
        _say("5/5  a sample")
        _run([*TRAIN, "generate", str(out), "--prompt", PROMPT, "--max-new-tokens", "80", "--ignore-end"])
    except CommandError as error:
        return error.code
    _summarise(out, config.train.total_steps, result, time.monotonic() - begin)
    return 0


def _corpus(source: Path, is_default: bool, out: Path) -> list[str]:
    """Arguments that name the text."""
    if not is_default:
        return [str(source), "--on-bad-text", "skip"]
    # Installed packages lie below the standard library; without them every machine of a Python version has the same
    # text.
    listing = sorted(path for path in source.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts))
    folder = out / "text"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "standard_library.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for file in listing:
            try:
                document = {"id": file.relative_to(source).as_posix(), "text": file.read_text(encoding="utf-8")}
            except UnicodeDecodeError:
                continue  # a few sources are there to test other encodings
            stream.write(json.dumps(document) + "\n")
    return [str(path)]


def _say(line: str) -> None:
    print(f"\n== {line}", flush=True)


def _run(command: list[str]) -> None:
    shown = {tuple(DATA): "infini-data", tuple(TRAIN): "infini-train"}[tuple(command[:3])]
    print(f"$ {shown} {shlex.join(command[3:])}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise CommandError(code)


def _evaluate(out: Path) -> dict[str, float]:
    command = [*TRAIN, "eval", str(out), "--max-tokens", "100000"]
    print(f"$ infini-train {shlex.join(command[3:])}", flush=True)
    done = subprocess.run([*command, "--json"], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise CommandError(done.returncode)
    return json.loads(done.stdout)


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
    _say("done")
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    here = shlex.quote(str(out))
    print(
        f"\nnext: infini-train generate {here} --prompt 'class '\n"
        f"      infini-train eval {here} --stream\n"
        f"      infini-train train demo --set run_dir={here} --set train.max_steps={2 * steps}   (goes on from here)\n"
        "      infini-train demo --text YOUR_TEXT --out runs/mine"
    )


def _last_gates(path: Path) -> tuple[float, float] | None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if "gates/lowest" in line]
    return (found[-1]["gates/lowest"], found[-1]["gates/highest"]) if found else None
