"""kill -9 at any moment of encoding, and again: in the end the same bytes as without."""

import json
import os
import random
import resource
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
    options = [
        "--tokenizer",
        "byte",
        "--holdout",
        "0.1",
        "--shard-mb",
        "0.4",
        "--workers",
        "2",
        "--on-bad-record",
        "skip",
    ]
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
        if (tmp_path / "set").exists():  # it was faster
            assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")
            shutil.rmtree(tmp_path / "set")
    assert start(tmp_path, "set").wait(120) == 0
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole") and len(hashes(tmp_path / "whole")) > 8
    assert not list(tmp_path.glob(".*"))


def call(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_tools", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=250, **options)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_told_and_the_work_goes_on_when_there_is_room(tmp_path, workers) -> None:
    """A limit of the size of files stands for the disk: the system refuses to write in the same way."""
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"text": f"{i} " * (100_000 if i == 30 else 20_000)}) + "\n")
    arguments = ["encode", "corpus.jsonl", "--tokenizer", "byte", "--out", "set", "--shard-mb", "0.3"]
    arguments += ["--workers", workers]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))

    full = call(tmp_path, *arguments, preexec_fn=limit)
    assert full.returncode == 2 and full.stderr.splitlines()[-1].endswith("can't be written: File too large")
    assert not (tmp_path / "set").exists() and list(tmp_path.glob(".set.partial/task-*"))
    assert not list(tmp_path.glob(".set.partial/.task-*"))
    assert call(tmp_path, *arguments).returncode == 0
    assert call(tmp_path, *arguments[:5], "whole", *arguments[6:]).returncode == 0
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")


SMALL_DISK = """
mount -t tmpfs -o size=2m tmpfs small || exit 77
"$@" --out small/set; echo "status $?"; ls -A small
mount -o remount,size=50m small
"$@" --out small/set && cp -r small/set set
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_small_file_system_that_is_full(tmp_path, workers) -> None:
    """A real one, in a mount namespace of its own; then it grows."""
    (tmp_path / "small").mkdir()
    with (tmp_path / "corpus.jsonl").open("w") as file:
        for i in range(60):
            file.write(json.dumps({"text": f"{i} " * 20_000}) + "\n")
    arguments = ["encode", "corpus.jsonl", "--tokenizer", "byte", "--shard-mb", "0.3", "--workers", workers]
    encode = [sys.executable, "-m", "data_tools", *arguments]
    inside = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", SMALL_DISK, "-"]
    done = subprocess.run(
        [*inside, *encode], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=250
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert "no space left on device; free some, or write to another folder" in done.stderr
    assert "status 2\n.set.partial\n" in done.stdout, "only finished tasks stay"
    assert call(tmp_path, *arguments, "--out", "whole").returncode == 0
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_a_line_of_200_mb_needs_less_than_1_gb(tmp_path) -> None:
    """With a trained tokenizer, whose own encoding of the whole text would take several times as much."""
    words = [f"word{i * i} of a line\\n" for i in range(1000)]
    (tmp_path / "small.jsonl").write_text("".join(json.dumps({"text": word * 20}) + "\n" for word in words))
    assert call(tmp_path, "tokenizer", "small.jsonl", "--out", "t.model", "--vocab-size", "300").returncode == 0
    with (tmp_path / "long.jsonl").open("w") as file:
        file.write('{"text": "' + "".join(words) * (200_000_000 // len("".join(words))) + '"}\n{"text": "short"}\n')
    assert (tmp_path / "long.jsonl").stat().st_size > 199_000_000
    # VmHWM is this program's own peak; ru_maxrss would also count what the calling process held when it started this.
    code = (
        "import re, sys; from data_tools.cli import main; status = main(sys.argv[1:]);"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    arguments = ["encode", "long.jsonl", "--tokenizer", "t.model", "--out", "set", "--workers", "1"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "set: 2 documents" in done.stdout
    assert int(done.stdout.split()[-1]) < 1_000_000, "KB"
