"""Ctrl-C and SIGTERM stop a run after the running step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infini_train.config.files import dump, load_run
from infini_train.train.opening import open_session

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Python in this folder, on one thread."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_sigterm_saves_without_a_traceback_and_the_next_start_goes_on(configure, tmp_path, tools, lines):
    config = configure("train.max_steps=1000000", "checkpoint.every_steps=1000000", "optim.schedule=wsd")
    (tmp_path / "endless.yaml").write_text(dump(config))
    process = start(tmp_path, "-m", "infini_train.cli", "train", "endless.yaml")
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    said += rest
    assert process.returncode == 128 + signal.SIGTERM, said + errors
    assert errors == "\nSIGTERM: saving after this step\n"
    (folder,) = [path for path in (config.directory / "checkpoints").iterdir() if path.is_dir()]
    step = int(folder.name.removeprefix("step-"))
    assert f"stopped by SIGTERM at step {step} of 1000000; the same command goes on from there" in said

    session = open_session(load_run(str(config.directory / "config.yaml")))
    assert lines == [f"resumed from {folder} (step {step})"]
    tools.drive(session, 1)
    assert session.step == step + 1


@pytest.mark.slow
def test_a_second_ctrl_c_gives_up_the_checkpoint_that_is_being_written(configure, tmp_path):
    (tmp_path / "endless.yaml").write_text(dump(configure("train.max_steps=1000000", "checkpoint.every_steps=1000000")))
    program = """
import time
from infini_train.checkpoint import store
store.save = lambda *_, **__: (print("writing", flush=True), time.sleep(1000))
from infini_train.cli import main
main(["train", "endless.yaml"])
"""
    process = start(tmp_path, "-c", program)
    try:
        assert process.stdout is not None
        for beginning in ("step", "writing"):
            assert any(line.startswith(beginning) for line in iter(process.stdout.readline, "")), beginning
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors == "\nSIGINT: saving after this step\nerror: interrupted\n"
