"""What the fuzz starts from: a valid source, dataset, config, run and export, and paths where no file should be."""

import json
import os
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

Run = Callable[[str, Sequence[str]], int]  # a command's name and arguments -> its exit code

CONFIG = {
    "model": {
        "vocab_size": 259,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 48,
        "attention": {"kind": "infini", "segment_tokens": 16},
    },
    "train": {"window_tokens": 64, "batch_lanes": 2, "max_steps": 2},
    "optim": {"warmup_steps": 1, "gate_lr": 3.0},
    "log": {"every_steps": 1},
    "parallel": {"timeout_s": 20},
}
PROGRAMS = "bin"  # first in the PATH of what is fuzzed
CLUSTER = {"gpus_per_node": 0, "tasks_per_node": 1, "cores_per_node": 2, "time_limit": "01:00:00"}
SLURM = {  # what stands in for its commands: on a login node the real ones would submit and cancel jobs
    "sbatch": 'case "$*" in *--test-only*) echo "sbatch: Job 1 to start" >&2;; *) echo 7;; esac',
    "squeue": "echo '7|RUNNING|1:02|1|node1|tiny'",
    "sacct": "exit 0",
    "scancel": "exit 0",
}
RECORDS = [{"id": f"d{number}", "text": "some words of text " * (1 + number % 7)} for number in range(60)]


def build(home: Path, run: Run) -> None:
    """Fills the folder; `run` calls a command."""
    programs = home / PROGRAMS
    programs.mkdir(parents=True)
    for name, script in SLURM.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (home / "a.jsonl").write_text(lines)
    (home / "a.txt").write_text("some words of text " * 50)
    pairs = [{"book": "a book " * 30, "summary": "short"} for _ in range(3)]
    (home / "books.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    encode = ["encode", str(home / "a.jsonl"), "--tokenizer", "byte", "--holdout", "0.2", "--out", str(home / "data")]
    tree = {**CONFIG, "data": {"train": str(home / "data/train"), "validation": str(home / "data/validation")}}
    (home / "tiny.yaml").write_text(yaml.safe_dump({**tree, "run_dir": str(home / "run")}))
    (home / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    for name, arguments in (
        ("infini-data", encode),
        ("infini-data", ["tokenizer", str(home / "a.jsonl"), "--vocab-size", "280", "--out", str(home / "t.model")]),
        ("infini-train", ["train", str(home / "tiny.yaml")]),
        ("infini-train", ["export", "hf", str(home / "run"), str(home / "exported")]),
    ):
        code = run(name, arguments)
        assert code == 0, f"{name} {' '.join(arguments)} ended with {code}; it must work before it is fuzzed"


def plant(work: Path) -> list[str]:
    """Puts what is no plain file into the folder; the paths are relative to it. Nothing here is worth protecting."""
    os.mkfifo(work / "pipe")
    for name, target in (("null", "/dev/null"), ("zero", "/dev/zero"), ("dangling", "nowhere"), ("loop", "loop")):
        (work / name).symlink_to(target)
    (work / "empty").touch()
    (work / "folder").mkdir()
    (work / "noise").write_bytes(random.Random(0).randbytes(4096))
    with open(os.fsencode(work) + b"/latin-\xe9.txt", "wb") as file:
        file.write(b"text")
    with socket.socket(socket.AF_UNIX) as server:  # by a relative name: such an address is short
        before = Path.cwd()
        os.chdir(work)
        server.bind("socket")
        os.chdir(before)
    special = ["pipe", "null", "zero", "dangling", "loop", "empty", "folder", "noise", "latin-\udce9.txt", "socket"]
    return [*special, "empty/x", "folder/x", "pipe/x", "nowhere", "nowhere/x"]
