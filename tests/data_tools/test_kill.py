"""kill -9 at any moment of encoding, and again: in the end the same bytes as without."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infini_train.data.manifest import hash_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def start(folder: Path, out: str) -> subprocess.Popen[bytes]:
    options = ["--tokenizer", "byte", "--holdout", "0.1", "--shard-mb", "0.4", "--workers", "2"]
    command = [sys.executable, "-m", "data_tools", "encode", "corpus.jsonl", "--out", out, *options]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_byte_for_byte_the_same(tmp_path, kills) -> None:
    draw = random.Random(kills)
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for i in range(2000):
            file.write(json.dumps({"id": i, "text": f"{i} {draw.random()} " * draw.randrange(200)}) + "\n")
    begin = time.monotonic()
    assert start(tmp_path, "whole").wait(120) == 0
    whole_s = time.monotonic() - begin
    killed = 0
    while killed < kills:
        process = start(tmp_path, "set")
        while not killed and not list(tmp_path.glob(".set.partial/task-*")):
            time.sleep(0.01)  # the first kill comes in the midst of the work, the others anywhere
        try:
            assert process.wait(draw.uniform(0, 1.2 * whole_s) if killed else 0) == 0
        except subprocess.TimeoutExpired:
            if draw.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)  # all of it at once
            else:
                process.kill()  # its workers find out by themselves
            process.wait()
            killed += 1
        else:  # it was faster
            assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")
            shutil.rmtree(tmp_path / "set")
    assert start(tmp_path, "set").wait(120) == 0
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole") and len(hashes(tmp_path / "whole")) > 8
    assert not list(tmp_path.glob(".*"))
