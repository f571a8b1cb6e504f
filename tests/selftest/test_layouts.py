"""Every layout against one process, in real processes: `infini-train selftest` itself, a test for each case.

A few cases run always. The rest of the table: `make test-layouts`.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infini_train.selftest.cases import CASES, Case
from infini_train.selftest.parity import TOLERANCES

FAST = {
    "tp2-sp-delta",
    "pp2-v2-delta-overlap",
    "cp2-delta-overlap",
    "cp2-gated-token-2layers",
    "dp2-zero3-linear",
    "cp2-delta-bf16",
    "cp2-delta-overlap-conv-2layers-varied",
    "tp2-sp-cp2-delta",
}
# Each is within another case that is tested: the same layout with more in it. The table has them for whoever must find
# out which part of a layout fails.
WITHIN_OTHERS = {
    "tp2-linear",
    "tp2-sp-linear",
    "pp2-linear",
    "pp2-delta",
    "cp2-linear",
    "cp2-delta",
    "dp2-linear",
    "dp2-zero3-linear-conv",
    "tp4-sp-linear",
    "cp4-delta",
    "cp2-dp2-zero2-linear",
    "tp2-sp-pp2-cp2-delta",
}
TIMEOUT_S = 1500


def launch(processes: int, names: list[str]) -> list[dict[str, Any]]:
    """Rows of these cases, in one launch."""
    done = subprocess.run(
        [sys.executable, "-m", "infini_train.cli", "selftest", "--json", f"--nproc={processes}"]
        + [f"--only={name}" for name in names],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()][1:]
    assert {row["case"] for row in rows} == set(names), done.stderr
    assert done.returncode == (0 if all(row["passed"] for row in rows) else 1), done.stderr
    return rows


@pytest.fixture(scope="session")
def row_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], dict[str, Any]]:
    """The row of a case: all selected cases of as many processes run together, once for all of pytest's workers."""
    here = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    calls = [item.callspec.params.get("case") for item in here]  # other files have cases of the same name
    selected = dict.fromkeys(case for case in calls if isinstance(case, Case))
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def find(case: Case) -> dict[str, Any]:
        file = folder / f"layouts-{case.processes}.json"
        with Path(f"{file}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                names = [other.name for other in selected if other.processes == case.processes]
                file.write_text("[]", encoding="utf-8")  # so that a launch that fails is not tried again for each case
                file.write_text(json.dumps(launch(case.processes, names)), encoding="utf-8")
        rows = {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))}
        assert case.name in rows, "the launch with this case has failed; see the first test that failed"
        return rows[case.name]

    return find


@pytest.mark.timeout(TIMEOUT_S + 100)  # more than the launch has, so that what it said is shown
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in FAST else pytest.mark.layouts)
        for case in CASES
        if case.name not in WITHIN_OTHERS
    ],
)
def test_a_layout_computes_what_one_process_does(case, row_of) -> None:
    row = row_of(case)
    assert row["failure"] == ""
    limits = TOLERANCES[case.precision]._asdict()
    assert {kind: worst for kind, worst in row["errors"].items() if not worst["error"] <= limits[kind]} == {}
    assert row["passed"]


def test_the_fast_cases_are_in_the_table() -> None:
    assert {case.name for case in CASES} >= FAST | WITHIN_OTHERS
    assert not FAST & WITHIN_OTHERS
