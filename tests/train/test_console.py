"""What `infini-train train` shows under --quiet, by default and under --verbose."""

import re

import pytest

from infini_train.cli import main
from infini_train.config.files import dump


@pytest.fixture
def show(configure, tmp_path, capsys):
    """Trains two steps and returns the lines on standard output and standard error."""

    def run(*arguments: str) -> tuple[list[str], list[str]]:
        settings = ("train.max_steps=2", "optim.warmup_steps=1", "optim.gate_lr=1e-6")
        config = configure(*settings, run="-".join(["run", *arguments]))
        (tmp_path / "run.yaml").write_text(dump(config))
        main(["train", str(tmp_path / "run.yaml"), *arguments])
        shown = capsys.readouterr()
        return shown.out.splitlines(), shown.err.splitlines()

    return run


def test_the_log_is_on_standard_output(show):
    out, err = show()
    assert [line.split()[0] for line in out] == ["run:", "warning:", "step", "step", "saved"] and err == []


def test_quiet_leaves_warnings(show):
    out, err = show("--quiet")
    assert [line.split(":")[:2] for line in out] == [["warning", " optim.gate_lr"]] and err == []


def test_verbose_names_operations(show):
    out, err = show("--verbose")
    assert all(re.match(r"\d\d:\d\d:\d\d rank 0: ", line) for line in out) and err == []
    assert sum(line.endswith("rank 0: step 1, forward of micro-batch 2 of 2") for line in out) == 1
    assert any(": saved " in line for line in out)
