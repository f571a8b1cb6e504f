"""What the command shows, in one process: a row for each case, also for one that fails."""

import json

import pytest

from infini_train.config.errors import ConfigError
from infini_train.selftest import run
from infini_train.selftest.cases import choose_cases
from infini_train.selftest.program import run_program

pytestmark = pytest.mark.usefixtures("process_groups")


def test_a_case_that_crashes_is_a_row_and_the_others_go_on(monkeypatch, capsys, tmp_path) -> None:
    def crash_with_offload(config) -> None:
        if config.parallel.offload_optimizer:
            raise RuntimeError("no such device\nand more")
        run_program(config)

    monkeypatch.setattr(run, "run_program", crash_with_offload)
    cases = choose_cases(1, ["offload-linear", "zero2-linear"])
    assert run.run_selftest(cases, tmp_path, as_json=True) == 1
    machine, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert machine["processes"] == 1 and {"device", "backend", "torch", "megatron-core", "deepspeed"} <= set(machine)
    failed = {row["case"]: row["failure"] for row in rows}
    assert failed == {"offload-linear": "rank 0: RuntimeError: no such device", "zero2-linear": ""}
    assert {row["case"]: row["passed"] for row in rows} == {"offload-linear": False, "zero2-linear": True}
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_failed_reference_is_told(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    assert run.run_selftest(choose_cases(1, ["zero2-linear"]), tmp_path) == 1
    assert "zero2-linear" in (said := capsys.readouterr().out) and "FAIL  the single process failed" in said


def test_a_folder_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="^.*nowhere is not a folder that all ranks can write and see"):
        run.run_selftest(choose_cases(1, ["zero2-linear"]), tmp_path / "nowhere")
