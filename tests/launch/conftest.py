"""A real Slurm cluster for the tests of this folder, and tiny runs on it."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from infini_train import logs
from infini_train.config.files import override, validate
from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from tests.launch.private_slurm import ACCOUNTING, PROGRAMS, SlurmCluster, wait_until

REQUIRED = "CI_REQUIRES_SLURM"  # set: without Slurm these tests fail instead of being skipped
START_S, JOB_S = 400, 600  # on a busy machine
STEPS = 40


@pytest.fixture(autouse=True)
def console_is_left() -> Iterator[None]:
    """`infini-launch` sets up the log of its whole process, which here goes on to other tests."""
    loggers = (logging.getLogger(), logging.getLogger(logs.ROOT))
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    yield from run_cluster(tmp_path_factory)


@pytest.fixture(scope="module")
def accounting_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """One that keeps accounts: slurmdbd on a database of its own."""
    yield from run_cluster(tmp_path_factory, ACCOUNTING)


def run_cluster(tmp_path_factory: pytest.TempPathFactory, more: tuple[str, ...] = ()) -> Iterator[SlurmCluster]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in (*PROGRAMS, *more) if shutil.which(program, path=path) is None]
    if missing:
        packages = "slurm-wlm slurmdbd mariadb-server-core mariadb-client-core munge"
        message = f"{', '.join(missing)} not found: apt-get install {packages}"
        assert REQUIRED not in os.environ, message
        pytest.skip(message)
    home = tmp_path_factory.mktemp("slurm")
    for folder in (home, *home.parents):  # munged refuses a socket below a folder that others can't enter
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055) if folder.is_relative_to("/tmp") and folder != Path(
                "/tmp"
            ) else None
    cluster = SlurmCluster(home, accounting=bool(more))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


# ---------------------------------------------------------------------------------------------------------------- runs

CLUSTER = {
    "gpus_per_node": 0,
    "tasks_per_node": 1,
    "cores_per_node": 4,
    "memory": "1G",
    "exclusive": True,
    "time_limit": "30:00",
    "signal_before_limit_s": 240,
    "network_interface": "lo",
    "environment": {"GLOO_SOCKET_IFNAME": "lo"},
    "preflight": False,
    "min_free_gib": 0,
    "restart": {"max_retries": 2, "backoff_s": 1},
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "train"
    random = np.random.default_rng(0)
    with ShardWriter(folder, ByteTokenizer()) as writer:
        for number in range(40):
            writer.add(random.integers(0, 64, 20 + 7 * number), n_bytes=20 + 7 * number, id=f"document {number}")
    return folder


@pytest.fixture(scope="session")
def run_tree(data: Path) -> dict[str, object]:
    """Config of a run that takes seconds on two processes; without its name and folder."""
    tree = {
        "model": {
            "vocab_size": 260,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 48,
            "attention": {"kind": "infini", "segment_tokens": 8},
        },
        "data": {"train": str(data)},
        "train": {"window_tokens": 64, "batch_lanes": 4, "micro_batch_lanes": 1, "max_steps": STEPS},
        "optim": {"lr": 3e-3, "gate_lr": 5e-2, "warmup_steps": 2},
        "log": {"every_steps": 1, "memory_every_steps": 1000},
        "checkpoint": {"every_steps": 5},
        "parallel": {"timeout_s": 60},
    }
    validate(override(tree, []))
    return tree


def read_losses(run_dir: Path) -> dict[int, float]:
    """Loss of each step; a step must be there once."""
    losses: dict[int, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss/train" in row:
            assert row["step"] not in losses, f"step {row['step']} is there twice"
            losses[row["step"]] = row["loss/train"]
    return losses


@dataclass
class Run:
    """A submitted run."""

    slurm: SlurmCluster
    directory: Path
    job: int

    def launch(self, *arguments: str) -> str:
        return self.slurm.run("infini-launch", *arguments)

    def status(self) -> dict[str, object]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.directory / "status.json").read_text())
        return {}

    def starts(self) -> int:
        path = self.directory / "launch" / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def step(self) -> int:
        return int(self.status().get("step", 0))

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.step() >= step, START_S, self.story, every_s=0.02)

    def wait_for_end(self) -> str:
        """Slurm's last state of the job."""
        return self.slurm.wait_for_end(self.job, JOB_S, self.story)

    def find_ranks(self) -> dict[int, int]:
        """The python process of each rank that trains."""
        found = {}
        mine = {f"SLURM_JOB_ID={self.job}", f"SLURM_CONF={self.slurm.environment['SLURM_CONF']}"}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = set((path / "environ").read_bytes().decode(errors="replace").split("\0"))
                name = (path / "comm").read_text().strip()
                if mine <= words and name.startswith(("python", "infini")):
                    variables = dict(word.split("=", 1) for word in words if "=" in word)
                    if "SLURM_PROCID" in variables:
                        found[int(variables["SLURM_PROCID"])] = int(path.name)
        return found

    @contextlib.contextmanager
    def hold(self, step: int) -> Iterator[dict[int, int]]:
        """Stops all ranks after a step, so that what is done inside is not too late; they continue afterwards."""
        self.wait_for_step(step)
        ranks = self.find_ranks()
        for process in ranks.values():
            os.kill(process, signal.SIGSTOP)
        try:
            assert self.status().get("state") != "finished", "too late to disturb it"
            yield ranks
        finally:
            for process in ranks.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    def come_near_limit(self) -> None:
        """Three to four minutes are left: Slurm looks every half a minute, and then warns at once."""
        begin = int((self.directory / "launch" / "starts").read_text().splitlines()[-1].split()[0])
        minutes = int(time.time() - begin) // 60 + 4
        self.slurm.run("scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}")
        wait_until(lambda: "time limit: asking" in self.job_log(), 100, self.story)

    def job_log(self) -> str:
        path = self.directory / "launch" / "job.log"
        return path.read_text() if path.exists() else ""

    def story(self) -> str:
        """All that the job said."""
        logs = sorted((self.directory / "launch").rglob("*.log"))
        texts = [f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs]
        outputs = [path.read_text() for path in (self.directory / "launch").glob("slurm-*.out")]
        return "\n".join([f"state {self.slurm.job_state(self.job)}, {self.status()}", *texts, *outputs])

    def losses(self) -> dict[int, float]:
        return read_losses(self.directory)

    def assert_complete(self, curve: dict[int, float], starts: int) -> None:
        assert self.wait_for_end() == "COMPLETED", self.story()
        assert self.starts() == starts, self.story()
        assert self.status()["state"] == "finished" and self.status()["restarts"] == starts - 1
        assert self.losses() == curve, self.story()


@pytest.fixture
def submit(slurm: SlurmCluster, run_tree: dict, tmp_path: Path) -> Callable[..., Run]:
    """Submits a run of `nodes` x `tasks`; further arguments are fields of the cluster's config."""

    def send(
        nodes: int = 2,
        tasks: int = 1,
        settings: tuple[str, ...] = (),
        programs: str = "",
        chain: int = 0,
        **fields: object,
    ) -> Run:
        if programs:
            path = {"PATH": f"{programs}:{slurm.environment['PATH']}"}
            fields["environment"] = {**path, **fields.get("environment", {})}
        directory = tmp_path / "a run's folder"  # a name that wants to be quoted
        run = {**run_tree, "name": tmp_path.name, "run_dir": str(directory)}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "tasks_per_node": tasks, **fields}))
        arguments = [str(tmp_path / "run.yaml"), f"--cluster={tmp_path / 'cluster.yaml'}", f"--nodes={nodes}"]
        command = ["chain", str(chain)] if chain else ["submit"]
        said = slurm.run("infini-launch", *command, *arguments, *(f"--set={each}" for each in settings), cwd=tmp_path)
        return Run(slurm, directory, int(said.split()[1].rstrip(";,")))

    return send


@pytest.fixture(scope="session")
def quiet_curve(run_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss of each step of two processes that nobody disturbs, without Slurm; once for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "quiet"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "run").exists():
            tree = {**run_tree, "name": "quiet", "run_dir": str(folder / "run")}
            (folder / "run.yaml").write_text(yaml.safe_dump(tree))
            command = [sys.executable, "-m", "launch.cli", "local", str(folder / "run.yaml"), "--nproc=2"]
            subprocess.run(command, cwd=folder, check=True)
    losses = read_losses(folder / "run")
    assert list(losses) == list(range(1, STEPS + 1))
    return losses
