"""Preflight: what a node finds out alone, what rank 0 makes of all, and two ranks of srun together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infini_train.exit_codes import BAD_NODE, DONE, MISTAKE
from infini_train.parallel import device, mesh
from infini_train.resilience.preflight import ALL, DEVICE, PLACE, Facts, check_count, check_node, judge

NONE_SEEN = "0 GPUs are seen, not 8: why"
FULL = "run_dir: {} GiB are free on /runs, less than 50"


def test_a_good_node_has_no_problems(tmp_path):
    assert check_node(tmp_path / "run", gpus=0, min_free_gib=0) == []


def test_a_bad_node_tells_all_its_problems(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file" / "below"))
    problems = check_node(tmp_path / "run", gpus=800, min_free_gib=1e9)
    assert "GPUs are seen, not 800" in problems[0]
    assert "GiB are free on" in problems[1] and problems[1].endswith("less than 1e+09")
    assert problems[2].startswith("TMPDIR: ") and "can't be written" in problems[2]


def test_the_odd_one_is_named():
    good = Facts("n1", [], {"torch": "2.1"}, 1000.0)
    facts = [good, good._replace(node="n2", versions={"torch": "2.0"}), good._replace(node="n3", clock_s=1060.0), good]
    assert judge(facts) == {
        "1": "rank 1 (n2): torch 2.0, the others have 2.1",
        "2": "rank 2 (n3): its clock is off by +60 s",
    }
    assert judge([good, good]) == {}


def report(*nodes: tuple[str, ...], ranks: int = 2) -> list[Facts]:
    """What the ranks of nodes with these problems report."""
    return [Facts(f"n{i}", list(found), {}, 1000.0) for i, found in enumerate(nodes, 1) for _ in range(ranks)]


@pytest.mark.parametrize(
    ("nodes", "shared"),
    [
        ([(NONE_SEEN,)] * 3, NONE_SEEN),
        ([(NONE_SEEN,), (NONE_SEEN, "TMPDIR: /tmp can't be written: Read-only file system")], NONE_SEEN),
        (
            [
                ("run_dir: 3.2 GiB are free on /runs, less than 50",),
                ("run_dir: 3.1 GiB are free on /runs, less than 50",),
            ],
            "run_dir: 3.2 GiB are free",
        ),
        ([(NONE_SEEN,)], NONE_SEEN),  # one node: the same image, started for the first time
    ],
)
def test_what_all_nodes_have_is_no_nodes_fault(nodes, shared):
    (verdict,) = judge(report(*nodes)).items()
    assert verdict[0] == ALL and f"problem: {shared}" in verdict[1]
    assert ("the only node (n1) has" if len(nodes) == 1 else f"all {len(nodes)} nodes have") in verdict[1]


@pytest.mark.parametrize(
    ("nodes", "bad"),
    [
        ([(NONE_SEEN,), (), ()], ["0", "1"]),  # one of several, with all its ranks
        ([("7 GPUs are seen, not 8",), ("6 GPUs are seen, not 8",)], ["0", "1", "2", "3"]),
        ([("7 GPUs are seen, not 8",)], ["0", "1"]),
        ([("TMPDIR: /tmp is full",), ("TMPDIR: /tmp is full",)], ["0", "1", "2", "3"]),  # scratch is a node's own
    ],
)
def test_what_one_node_has_is_its_fault(nodes, bad):
    assert list(judge(report(*nodes))) == bad


def test_an_image_that_has_worked_is_not_the_cause(monkeypatch):
    """A job of one node that was requeued: since then its node has lost the driver."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert list(judge(report((NONE_SEEN,)))) == ["0", "1"]


def test_a_device_is_no_nodes_fault_if_none_works_anywhere():
    broken = f"{DEVICE}: CUDA error: uncorrectable ECC error"
    assert list(judge(report((broken,), (broken,)))) == [ALL]
    facts = report((), ())
    facts[0].problems.append(broken)  # one device of each node
    facts[3].problems.append(broken)
    assert list(judge(facts)) == ["0", "3"]


def test_what_a_node_has_besides_is_told_too():
    facts = report((NONE_SEEN,), (NONE_SEEN,))
    facts[2].problems.append("its clock is off by +9 s")
    assert "another start would find the same; besides, rank 2 (n2): its clock is off" in judge(facts)[ALL]


@pytest.mark.parametrize("restarts", ["0", "2"])
def test_ranks_that_share_a_gpu_of_the_only_node_are_not_its_fault(restarts, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert list(judge([Facts("n1", [], {}, 0.0, "a")] * 2)) == [ALL]
    assert list(judge([Facts("n1", [f"{PLACE}: LOCAL_RANK: is 4"], {}, 0.0)])) == [ALL]


def test_ranks_with_one_gpu_are_told():
    facts = [Facts("n1", [], {}, 0.0, "a"), Facts("n1", [], {}, 0.0, "a"), Facts("n2", [], {}, 0.0, "a")]
    assert judge(facts) == {str(i): f"rank {i} (n1): 2 ranks would use one GPU, which NCCL refuses" for i in (0, 1)}


@pytest.mark.parametrize(("visible", "seen", "problems"), [("3", 1, 0), ("0,1,2,3", 1, 1), (None, 4, 0), (None, 3, 1)])
def test_a_task_may_see_its_own_gpu_alone(visible, seen, problems, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(device, "count", lambda: seen)
    assert len(check_count(4)) == problems


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script, not a task of srun
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (1, 2)),
    ],
)
def test_the_world_is_that_of_the_starter(variables, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert mesh.world() == expected


def start_ranks(run_dir: Path, *scratch: Path, room: str = "resilience", gpus: int = 0) -> list[tuple[int, str]]:
    """Two ranks with srun's variables; exit code and console of each."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    processes = []
    for rank, folder in enumerate(scratch):
        variables = {
            "SLURM_PROCID": str(rank),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0",
            "SLURMD_NODENAME": f"n{rank + 1}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        }
        command = [sys.executable, "-m", f"infini_train.{room}.preflight", str(run_dir), "--min-free-gib=0"]
        command += [f"--gpus={gpus}"] * (gpus > 0)
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env={**os.environ, **variables}, stdout=pipe, stderr=pipe, text=True)
        )
    outputs = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, "".join(output)) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_two_ranks_agree_and_measure(tmp_path):
    (first, said), (second, _) = start_ranks(tmp_path / "run", tmp_path, tmp_path)
    assert (first, second) == (0, 0), said
    assert "preflight: 2 ranks are well; all-reduce " in said


@pytest.mark.slow
def test_the_rank_of_a_bad_node_has_its_own_exit_code(tmp_path):
    (tmp_path / "file").touch()
    scratch = (tmp_path, tmp_path / "file" / "below")
    (first, said), (second, own) = start_ranks(tmp_path / "run", *scratch, room="parallel")  # the former name
    assert (first, second) == (DONE, BAD_NODE)
    assert "note: infini_train.parallel.preflight has moved to" in said and "note: " not in own
    assert "error: preflight: rank 1 (n2): TMPDIR: " in said and "error: preflight: rank 1 (n2): TMPDIR: " in own


@pytest.mark.slow
def test_an_image_without_gpus_is_told_by_all_and_excludes_no_node(tmp_path):
    ranks = start_ranks(tmp_path / "run", tmp_path, tmp_path, gpus=8)
    for code, said in ranks:
        assert code == MISTAKE
        assert said.startswith("error: preflight: all 2 nodes have this problem: 0 GPUs are seen, not 8: ")
        assert said.count("\n") == 1 and "no node is left out" in said
