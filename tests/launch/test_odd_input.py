"""What infini-launch reads may be damaged or somebody else's: good runs are shown, and nothing waits or crashes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import status
from launch.cli import main

STATUS = [
    ("deep", b"[" * 100_000),
    ("deep mapping", b'{"state": ' * 50_000 + b"1" + b"}" * 50_000),
    ("huge", b" " * (1 << 20) + b"{}"),
    ("empty", b""),
    ("not JSON", b"\xff\xfe\x00nonsense"),
    ("a list", b"[1, 2]"),
    ("wrong types", b'{"state": ["training"], "step": "5", "loss": {}, "tokens_per_s": null, "heartbeat": true}'),
    ("odd types", b'{"state": {"a": 1}, "total_steps": [], "eta_s": "soon", "restarts": {}}'),
    ("no numbers", b'{"state": "training", "step": 5, "loss": NaN, "tokens_per_s": Infinity, "heartbeat": -Infinity}'),
    (
        "large numbers",
        b'{"step": 1' + b"0" * 4000 + b', "loss": 1e999, "eta_s": 1e300, "heartbeat": 1' + b"0" * 400 + b"}",
    ),
    ("too many digits", b'{"step": 1' + b"0" * 5000 + b"}"),
    ("a surrogate", b'{"state": "\\ud800", "step": 1, "total_steps": 2}'),
    ("escapes", b'{"state": "a\\u001b[2J\\nb", "step": 1}'),
    ("a long state", json.dumps({"state": "x" * 500_000}).encode()),
]
LAUNCH = ["job", "submitted", "fence", "last_failure", "job.log"]
ODD: list[tuple[str, Callable[[Path], None]]] = [
    ("pipe", lambda path: os.mkfifo(path)),
    ("folder", lambda path: path.mkdir()),
    ("loop", lambda path: path.symlink_to(path.name)),
    ("device", lambda path: path.symlink_to("/dev/zero")),
    ("nonsense", lambda path: path.write_bytes(b"\xff\x00" * 100)),
    ("long number", lambda path: path.write_text("9" * 5000)),
    ("foreign digits", lambda path: path.write_text("²٣")),
]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one run that is well and one to be spoilt; no Slurm."""
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("odd", "well"):
        (tmp_path / name / "launch" / "logs").mkdir(parents=True)
    said = {"state": "training", "step": 5, "total_steps": 9, "loss": 2.5, "heartbeat": time.time() - 5}
    (tmp_path / "well" / "status.json").write_text(json.dumps(said))
    return tmp_path


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


def assert_both_are_shown(runs: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """As a table and as JSON; returns the odd run's line."""
    table = show(capsys, "status", str(runs)).splitlines()
    assert len(table) == 3 and all(line.isprintable() and len(line) < 1000 for line in table), table
    assert table[2].split()[:5] == [str(runs / "well"), "-", "training", "5/9", "2.5000"]
    for line in show(capsys, "status", str(runs), "--json").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return table[1]


@pytest.mark.parametrize(("name", "content"), STATUS, ids=[name for name, _ in STATUS])
def test_an_odd_status_spoils_no_other_run(runs: Path, name: str, content: bytes, capsys) -> None:
    (runs / "odd" / "status.json").write_bytes(content)
    line = assert_both_are_shown(runs, capsys)
    if name in ("deep", "huge", "empty", "not JSON", "a list", "too many digits"):
        assert " unknown " in line and "status.json: " in line, "it says why"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9), st.lists, max_leaves=4
)
KEYS = ("state", "step", "total_steps", "loss", "tokens_per_s", "eta_s", "restarts", "heartbeat", "other")


@settings(max_examples=100, deadline=None)
@given(said=st.dictionaries(st.sampled_from(KEYS), JSON))
def test_whatever_a_status_says_it_makes_a_row(said: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-status"
    folder.mkdir(exist_ok=True)
    (folder / "status.json").write_text(json.dumps(said))
    rows = status.describe_runs([folder], {})
    assert status.format_table(rows).count("\n") == 2
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("name", ["status.json", *(f"launch/{each}" for each in LAUNCH), "launch/ranks/0.json"])
@pytest.mark.parametrize(("kind", "make"), ODD, ids=[kind for kind, _ in ODD])
def test_odd_files_spoil_no_other_run(runs: Path, name: str, kind: str, make: Callable, capsys) -> None:
    if name != "status.json":
        (runs / "odd" / "status.json").write_text('{"state": "training", "step": 1, "total_steps": 2}')
    (runs / "odd" / "launch" / "ranks").mkdir()
    make(runs / "odd" / name)
    assert_both_are_shown(runs, capsys)


def test_odd_ranks_and_log_folders_are_left_out(runs: Path, capsys) -> None:
    (runs / "odd" / "status.json").write_text('{"state": "training"}')
    for name in ("a.b", "1.2.3", "٣.0", f"{'9' * 200}.0", "7.0"):
        (runs / "odd" / "launch" / "logs" / name).mkdir()
    (runs / "odd" / "launch" / "logs" / "7.0" / "train-0.log").write_text("step 1\n")
    ranks = runs / "odd" / "launch" / "ranks"
    ranks.mkdir()
    rank = {"place": "n1\n\x1b[2J", "operation": "x", "for_s": 1, "start": "", "world_size": 9, "own_s": 1, "step_s": 2}
    for i, change in enumerate(
        ({}, {"for_s": "1"}, {"world_size": None}, {"own_s": [1]}, {"step_s": "a"}, {"place": {}})
    ):
        (ranks / f"{i}.json").write_text(json.dumps({**rank, **change}))
    (ranks / "x.json").write_text(json.dumps(rank))
    (ranks / "6.json").write_text("[" * 100_000)
    assert_both_are_shown(runs, capsys)
    assert show(capsys, "logs", str(runs / "odd")) == "step 1\n"


def test_names_and_failures_stay_on_their_line(runs: Path, capsys) -> None:
    os.rename(runs / "odd", os.fsencode(runs) + b"/a\nb\x1b[2J\xff")
    folder = next(path for path in runs.iterdir() if path.name.startswith("a"))
    (folder / "launch" / "last_failure").write_text("first\nsecond \x1b[31m")
    (folder / "launch" / "job").write_text("3")
    assert "a\\nb\\x1b[2J" in assert_both_are_shown(runs, capsys)


# ----------------------------------------------------------------------------------------------------- Slurm's commands


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(**scripts: str) -> None:
        for name, text in scripts.items():
            (folder / name).write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)

    return install


QUEUE = "12|PENDING|0:00|2|(Resources)|well"


@pytest.mark.parametrize(
    "squeue",
    [
        f"echo 'warning: the controller is busy'; echo '{QUEUE}'",
        f"echo '12_[3-4]|PENDING|0:00|1|(x)|a'; echo '||||'; echo 'x'; echo; echo '{QUEUE}'",
        f"echo '99|RUNNING|0:01|2K|n[1-2000]|big'; echo '{QUEUE}'",
        f"printf '98|RUN\\xff|0:01|1|n1|\\xfe\\n'; echo '{QUEUE}|with|bars'",
        "echo '12|PENDING|0:00|2|(Resources)'",
    ],
)
def test_odd_lines_of_squeue_are_left_out(runs: Path, slurm, squeue: str, capsys) -> None:
    slurm(squeue=squeue)
    (runs / "well" / "launch" / "job").write_text("12\n")
    lines = show(capsys, "status", str(runs)).splitlines()
    assert lines[2].split()[:3] == [str(runs / "well"), "12", "pending"] and lines[2].endswith("(Resources)")


def test_settings_of_squeue_hide_no_job(runs: Path, slurm, monkeypatch, capsys) -> None:
    slurm(squeue=f"[ -n \"$SQUEUE_STATES\" ] || echo '{QUEUE}'")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    (runs / "well" / "launch" / "job").write_text("12\n")
    assert " pending " in show(capsys, "status", str(runs))


@pytest.mark.parametrize(
    "sacct", ["echo x", "echo '12||||'", "echo '12|FAILED'", "printf '12|\\xff|0:0|1|n\\n'", "exit 1"]
)
def test_odd_lines_of_sacct_are_left_out(runs: Path, slurm, sacct: str, capsys) -> None:
    slurm(squeue="", sacct=sacct)
    (runs / "well" / "launch" / "job").write_text("12\n")
    assert show(capsys, "status", str(runs)).splitlines()[2].split()[:2] == [str(runs / "well"), "12"]


@pytest.mark.parametrize(
    ("sbatch", "message"),
    [
        ("echo Submitted", "sbatch: printed 'Submitted' instead of a job's ID; see squeue --me"),
        ("true", "sbatch: printed '' instead of a job's ID"),
        ("printf '\\xff\\n'", "sbatch: printed '\ufffd' instead"),
        (
            "echo 'sbatch: error: bad' >&2; echo 'sbatch: error: no \x1b[2J partition' >&2; exit 1",
            "sbatch: error: no  [2J",
        ),
        ("exit 3", "sbatch: exit code 3"),
        ("#!/nonexistent", "sbatch: "),
    ],
)
def test_an_sbatch_that_fails_gets_one_line(slurm, tmp_path: Path, sbatch: str, message: str, capsys) -> None:
    slurm(squeue="", sbatch=sbatch)
    with pytest.raises(SystemExit) as ended:
        main(["submit", "1b", "--cluster", "plain", "--set", f"run_dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1 and error[:-1].isprintable()


@pytest.mark.parametrize("said", ["echo 77", "echo '77;cluster'", "echo 'Welcome to the cluster'; echo 77"])
def test_a_jobs_id_is_found(slurm, tmp_path: Path, said: str, capsys) -> None:
    slurm(squeue="echo '5|RUNNING|1:00|1|n1|1b'; echo '6|RUNNING|1:00|1|n1|other'", sbatch=said)
    with pytest.raises(SystemExit):
        main(["submit", "1b", "--cluster", "plain", "--set", f"run_dir={tmp_path / 'run'}"])
    shown = capsys.readouterr()
    assert shown.out.startswith("job 77; see") and shown.err == "", "another folder, and so another name"


def test_another_job_of_this_name_is_told(slurm, tmp_path: Path, capsys, monkeypatch) -> None:
    """Of another checkout, where the same run has the same name and folder."""
    slurm(squeue="echo '5|RUNNING|1:00|1|n1|1b'", sbatch="echo 77")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["submit", "1b", "--cluster", "plain"])
    assert capsys.readouterr().err.startswith("warning: job 5 has the name 1b too, and the two run one at a time")
