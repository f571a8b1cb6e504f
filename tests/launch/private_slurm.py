"""A real Slurm cluster of four nodes on this machine, private and below a temporary folder."""

import contextlib
import getpass
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare")
ACCOUNTING = ("mariadbd", "mariadb-install-db", "my_print_defaults", "slurmdbd")
NODES, CORES, GPUS = 4, 96, 8
NAMESPACES = ["unshare", "--pid", "--uts", "--mount-proc", "--fork", "--kill-child"]
UNPRIVILEGED = [*NAMESPACES[:1], "--user", "--map-current-user", "--keep-caps", *NAMESPACES[1:]]
START_NODE = 'mount --bind "$2/hosts" /etc/hosts; hostname "$1"; exec slurmd -D -N "$1"'
SLURM_CONF = (Path(__file__).parent / "slurm.conf").read_text()  # with {fields}
STORAGE = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={home}/munge/sock
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={home}/munge/sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={own_port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={port}
StorageUser=root
StorageLoc=slurm
LogFile={home}/log/slurmdbd.log
PidFile={home}/run/slurmdbd.pid
"""
NODE_CONF = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Sockets=2 CoresPerSocket={cores}"
    " ThreadsPerCore=1 RealMemory=1048576 Gres=gpu:h100:{gpus} State=UNKNOWN\n"
)
PAPER_NODES = (  # never started: they can be asked for, but run nothing
    "NodeName=x[1-60] NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Sockets=2 CoresPerSocket={cores}"
    " ThreadsPerCore=1 RealMemory=1048576 Gres=gpu:h100:{gpus} State=DOWN\n"
)


def wait_until(
    condition: Callable[[], bool], seconds: float, what: str | Callable[[], str], every_s: float = 0.1
) -> None:
    """Polls; fails with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s: {what if isinstance(what, str) else what()}"
        time.sleep(every_s)


FIRST_PORT, PORTS = 22000, 40
# Not NODE_FAIL or PREEMPTED: from those a job comes back.
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


def free_ports(count: int) -> int:
    """First of some free ports in a row, below those that the kernel gives out."""
    for base in range(FIRST_PORT + os.getpid() % 200 * PORTS, 32000, PORTS):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return base
    raise AssertionError("no free ports")


class SlurmCluster:
    """slurmctld and a slurmd for each node, each in namespaces of its own: to kill its first process is a node crash.

    Nothing is written outside of `home`, and nothing listens beyond loopback.
    """

    def __init__(self, home: Path, accounting: bool = False) -> None:
        self.home, self.port, self.accounting = home, free_ports(3 + NODES), accounting
        self.names = [f"n{i}" for i in range(1, NODES + 1)]
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(home / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: list[int] = []
        self._database: subprocess.Popen[bytes] | None = None
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for folder in ("munge", "ctld", "log", "run", "dev", *(f"spool.{name}" for name in self.names)):
            (self.home / folder).mkdir(mode=0o755)
        self._write_configuration()
        munge = self.home / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed", "log")]
        self.run("munged", *files, f"--socket={munge / 'sock'}", *(["--force"] if os.geteuid() == 0 else []))
        self._daemons.append(int((munge / "pid").read_text()))
        if self.accounting:
            self._start_accounting()
        self._start_daemon("slurmctld")
        for name in self.names:
            self.start_node(name)
        wait_until(
            lambda: self.run("sinfo", "-hNpbatch", "-tidle", "-o%N").split() == self.names, 60, self.controller_log
        )

    def _start_daemon(self, name: str) -> None:
        self.run(name)
        pid = self.home / "run" / f"{name}.pid"
        wait_until(lambda: pid.exists() and pid.read_text().endswith("\n"), 20, self.controller_log)
        self._daemons.append(int(pid.read_text()))

    def _start_accounting(self) -> None:
        """A database of its own, and slurmdbd."""
        folder, port = self.home / "database", self.port + NODES + 1
        user = ["--user=root"] if os.geteuid() == 0 else []
        options = ["--no-defaults", *user, f"--datadir={folder}"]
        self.run("mariadb-install-db", *options, "--auth-root-authentication-method=normal", "--skip-test-db")
        more = [f"--socket={folder / 'sock'}", f"--port={port}", "--bind-address=127.0.0.1", "--skip-name-resolve"]
        with (self.home / "log" / "database.log").open("ab") as log:
            self._database = subprocess.Popen(
                ["mariadbd", *options, *more, "--innodb-buffer-pool-size=32M"],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until((folder / "sock").exists, 60, "the database's socket")
        path = self.home / "slurmdbd.conf"
        values = {"home": self.home, "port": port, "own_port": port + 1, "user": getpass.getuser()}
        path.write_text(SLURMDBD_CONF.format(**values))
        path.chmod(0o600)
        self._start_daemon("slurmdbd")
        added = lambda: self.ask("sacctmgr", "--immediate", "add", "cluster", "test").returncode == 0  # noqa: E731
        wait_until(added, 60, "slurmdbd's answer", every_s=0.5)

    def _write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        # Ranks meet at a port that follows from their job's number: clusters beside this one have other numbers.
        values = {"home": self.home, "host": host, "port": self.port, "user": getpass.getuser(), "nodes": NODES}
        values["accounting"] = STORAGE.format(home=self.home, port=self.port + NODES + 2) if self.accounting else ""
        values["first_job"] = self.port - FIRST_PORT + 1
        shape, hosts = {"host": host, "cores": CORES // 2, "gpus": GPUS}, Path("/etc/hosts").read_text()
        lines = PAPER_NODES.format(port=self.port, **shape)
        for i, name in enumerate(self.names, start=1):
            lines += NODE_CONF.format(name=name, port=self.port + i, **shape)
            hosts += f"127.0.0.1 {name}\n"
        (self.home / "slurm.conf").write_text(SLURM_CONF.format(**values, node_lines=lines))
        (self.home / "hosts").write_text(hosts)
        (self.home / "plugstack.conf").touch()
        for i in range(GPUS):
            (self.home / "dev" / f"nvidia{i}").symlink_to("/dev/null")
        (self.home / "gres.conf").write_text(
            "".join(
                f"NodeName={names} Name=gpu Type=h100 File={self.home}/dev/nvidia[0-{GPUS - 1}]\n"
                for names in (f"n[1-{NODES}]", "x[1-60]")
            )
        )
        key = self.home / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def start_node(self, name: str) -> None:
        wrap = next(wrap for wrap in (NAMESPACES, UNPRIVILEGED) if not subprocess.run([*wrap, "true"]).returncode)
        with (self.home / "log" / f"{name}.out").open("ab") as log:
            self._nodes[name] = subprocess.Popen(
                [*wrap, "bash", "-c", START_NODE, "-", name, str(self.home)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill_node(self, name: str) -> None:
        """A crash: slurmd and all tasks of the node die at once."""
        self._nodes[name].kill()
        self._nodes[name].wait()

    def enter(self, name: str, *command: str) -> str:
        """Runs a command inside a node."""
        return self.run("nsenter", f"--target={self._find_slurmd(name)}", "--mount", "--pid", "--uts", *command)

    @contextlib.contextmanager
    def freeze_node(self, name: str) -> Iterator[None]:
        """Its slurmd does not answer; tasks that run there continue."""
        slurmd = self._find_slurmd(name)
        os.kill(slurmd, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(slurmd, signal.SIGCONT)

    def _find_slurmd(self, name: str) -> int:
        pid = self._nodes[name].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def stop(self) -> None:
        subprocess.run(["scancel", "--quiet", "--user", getpass.getuser()], env=self.environment, check=False)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.run("squeue", "-h"), 15, "an empty queue")
        for name in self._nodes:
            self.kill_node(name)
        for pid in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 10, "a daemon's end")
        if self._database is not None:
            self._database.kill()
            self._database.wait()

    def run(self, *command: str, **options: object) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=600, check=False, **options
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command that may fail."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    wait_until = staticmethod(wait_until)

    def controller_log(self) -> str:
        path = self.home / "log" / "slurmctld.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-30:]) if path.exists() else "no slurmctld.log"

    def wait_for_end(self, job: int, seconds: float, what: str | Callable[[], str]) -> str:
        """The state in which the job ended. Besides those of a job that waits or runs there are others in passing, such
        as SIGNALING, so that only the ends can be listed.
        """
        seen = ""

        def has_ended() -> bool:
            nonlocal seen
            seen = self.job_state(job)
            return seen in ENDS

        wait_until(has_ended, seconds, what, every_s=0.5)
        return seen

    def job_state(self, job: int) -> str:
        """Empty if the controller has no time to answer."""
        command = ["squeue", "-h", "-tall", f"-j{job}", "-o%T"]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout.strip()
