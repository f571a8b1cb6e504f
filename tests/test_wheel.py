"""The wheel alone, installed elsewhere, holds all code and configs and trains the demo."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("infini_train-*.whl")
    return wheel


def test_the_wheel_holds_code_and_configs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"infini_train", "data_tools", "launch"}
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"infini_train/configs/{name}" for name in configs} <= set(names)
    templates = {f"launch/templates/{path.name}" for path in (ROOT / "slurm" / "templates").iterdir()}
    assert templates and templates <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "configs"))]


def test_the_installed_wheel_trains_the_demo(wheel: Path, tmp_path: Path) -> None:
    """A new environment; torch and the other dependencies are lent by this one, the project is not."""
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)], **run)
    assert done.returncode == 0, done.stdout + done.stderr
    home = Path(
        subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], **run).stdout.strip()
    )
    # Path files of the lent folder are not read, so the checkout's editable install stays invisible.
    (home / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import infini_train, data_tools; print(infini_train.__file__, data_tools.__file__)"
    said = subprocess.run([python, "-c", code], **run).stdout.split()
    assert all(Path(path).is_relative_to(home) for path in said) and len(said) == 2

    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        words = " ".join(f"word{(number * i) % 50} of {i % 7}" for i in range(400))
        (text / f"{number}.txt").write_text(words)
    short = ["model.vocab_size=280", "train.max_steps=4", "train.window_tokens=256", "optim.warmup_steps=1"]
    sets = [word for setting in short for word in ("--set", setting)]
    command = [tmp_path / "venv" / "bin" / "infini-train", "demo", "--text", str(text), "--out", "out", *sets]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unigram entropy" in done.stdout and "checkpoint" in done.stdout
    assert (tmp_path / "out" / "checkpoints" / "step-00000004" / "index.json").is_file()
