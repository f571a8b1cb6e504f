"""The Dockerfile without Docker: hadolint reads it, and what it copies and runs works in a folder of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STEPS = [
    tuple(line.split(" ", 1)) for line in re.sub(r"\\\n\s*", "", TEXT).splitlines() if line and not line.startswith("#")
]


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_asks_for_the_driver_and_for_infiniband() -> None:
    """Without the variables a container has no driver; without the libraries NCCL uses TCP."""
    (variables,) = [words for kind, words in STEPS if kind == "ENV"]
    assert variables.split() == ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
    (packages,) = [words for kind, words in STEPS if kind == "RUN" and "apt-get" in words]
    assert {"libibverbs1", "librdmacm1", "ibverbs-providers"} <= set(packages.split())


def test_what_is_ignored_is_not_copied() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".venv*", "runs", "data", ".git"} <= set(ignored)


@pytest.mark.slow
def test_its_steps_install_the_project(tmp_path: Path) -> None:
    """All but apt-get; the dependencies are left out here, since they are those of `make install`."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    there = tmp_path / "image"
    there.mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for kind, words in STEPS:
        if kind == "COPY":
            *sources, target = words.split()
            for name in [name for name in tracked if sources == ["."] and name] or sources:
                path = there / target / name if target.endswith(("/", ".")) else there / target
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, path)
        elif kind == "RUN" and "apt-get" not in words:
            words = words.replace("pip install", "pip install --no-deps")
            done = subprocess.run(["sh", "-c", words], cwd=there, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    code = "import launch, launch.render, infini_train; print(launch.render.template_root(), infini_train.__file__)"
    lent = subprocess.run(  # the dependencies are this environment's; the project is the installed one
        [tmp_path / "venv" / "bin" / "python", "-c", f"import sys; sys.path.append({SITE!r}); {code}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    templates, package = lent.stdout.split()
    assert (Path(templates) / "train.sbatch.j2").is_file()
    assert Path(package).is_relative_to(tmp_path / "venv") and Path(templates).is_relative_to(tmp_path / "venv")


SITE = next(path for path in sys.path if path.endswith("site-packages"))
