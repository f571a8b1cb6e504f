"""A cluster: the schema of configs/cluster/*.yaml, and its validation."""

import dataclasses
import difflib
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic

from infini_train.config.errors import ConfigError
from infini_train.config.files import override, read_tree, resolve
from infini_train.redaction import redact, redact_variable

# sbatch parses #SBATCH lines by its own rules, so what goes there is restricted instead of quoted.
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@%+\[\]&|*/-]*")
EXTRA = re.compile(r"--[a-z][a-z-]*(?:=[A-Za-z0-9_.,:@%+\[\]&|*/-]+)?")
TIME_LIMIT = re.compile(r"(?:\d+-\d{1,2}(?::\d{1,2}){0,2}|\d+(?::\d{1,2}){0,2})")
MEMORY = re.compile(r"\d+[KMGT]?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
INTERFACE = re.compile(r"[\^=]{0,2}[A-Za-z0-9_.,-]+")
READ_ONLY = ("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID", "IFS")  # for bash, or for a sane script
OWN_OPTIONS = ("nodes", "ntasks", "array", "requeue", "no-requeue", "signal", "output", "error", "dependency", "wrap")
FIELD_OF = {"time": "time_limit", "job-name": "name of the run's config"}  # options that checks here must know of
EARLY_S = 60  # Slurm may send its signal this much earlier than asked


def _require(condition: bool, path: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{path}: {message}")


def _require_text(value: str, path: str) -> None:
    """Refuses a value that no shell line or environment variable can hold."""
    _require(value.isprintable() and value.strip() != "", path, "must be one line of printable text, not empty")


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """A container for every rank, started by Slurm's Pyxis plugin on top of Enroot."""

    image: str  # name in a registry, or a .sqsh file
    mounts: tuple[str, ...] = ()  # HOST:CONTAINER or HOST:CONTAINER:ro; data, code and runs must be among them
    workdir: str | None = None  # folder inside the container; null: the folder the job was submitted from

    def __post_init__(self) -> None:
        for name, value in (("image", self.image), ("workdir", self.workdir or ".")):
            _require_text(value, f"container.{name}")
        for mount in self.mounts:
            _require_text(mount, "container.mounts")
            _require(
                "," not in mount and ":" in mount, "container.mounts", f"write {mount!r} as HOST:CONTAINER, no commas"
            )


@dataclass(frozen=True, kw_only=True)
class RestartConfig:
    """What the batch script does after training fails."""

    max_retries: int = 3  # consecutive failures without a new checkpoint; 0: any failure ends the job
    backoff_s: int = 30  # wait before the first retry; doubles with each retry, up to 10 minutes

    def __post_init__(self) -> None:
        for name in ("max_retries", "backoff_s"):
            _require(getattr(self, name) >= 0, f"restart.{name}", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where jobs run, and with which software. One task is started per GPU."""

    gpus_per_node: int  # 0: a cluster without GPUs
    cores_per_node: int  # divided among the tasks of a node
    tasks_per_node: int | None = None  # null: one per GPU
    gpu_type: str | None = None  # as in --gres=gpu:h100:8; null: any
    partition: str | None = None  # null: the cluster's default
    account: str | None = None
    qos: str | None = None
    memory: str = "0"  # per node, as in 900G; 0: all
    exclusive: bool = True  # whole nodes
    time_limit: str = "24:00:00"  # minutes, hours:minutes:seconds or days-hours
    signal_before_limit_s: int = (
        300  # time to save: at least a step, a checkpoint, and the minute that Slurm may be late
    )
    requeue: bool = True  # a job may requeue itself; otherwise it ends, and the next job of a chain continues
    network_interface: str | None = None  # for NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, as in ib0 or ^lo,docker0
    container: ContainerConfig | None = None
    venv: str | None = None  # folder of a Python environment with infini-train
    modules: tuple[str, ...] = ()  # for `module load`
    environment: dict[str, str | None] = field(default_factory=dict)  # for the job; null: as it is at submission
    sbatch: tuple[str, ...] = ()  # more options, as in --constraint=h100
    srun: tuple[str, ...] = ()  # more options of the ranks' srun, as in --cpu-bind=cores
    preflight: bool = True  # check every node before training
    min_free_gib: int = 50  # free space that preflight requires on the run's file system
    exclude_bad_nodes: bool = True  # a requeued job avoids the nodes that failed preflight
    restart: RestartConfig = field(default_factory=RestartConfig)

    def __post_init__(self) -> None:
        for name in ("cores_per_node", "signal_before_limit_s"):
            _require(getattr(self, name) > 0, name, "must be positive")
        for name in ("gpus_per_node", "min_free_gib"):
            _require(getattr(self, name) >= 0, name, "must not be negative")
        _require(self.signal_before_limit_s <= 65535, "signal_before_limit_s", "sbatch takes at most 65535")
        _require(self.tasks > 0, "tasks_per_node", "must be positive (it is gpus_per_node if not given)")
        _require(
            self.cores_per_node >= self.tasks,
            "cores_per_node",
            f"{self.cores_per_node} cores don't suffice for {self.tasks} tasks",
        )
        _require(
            self.container is None or self.venv is None, "venv", "can't be used inside a container; give one of the two"
        )
        for name in ("partition", "account", "qos", "gpu_type"):
            value = getattr(self, name)
            _require(
                value is None or bool(WORD.fullmatch(value)),
                name,
                f"{json.dumps(value)} is not a name that sbatch takes",
            )
        _require_match(TIME_LIMIT, self.time_limit, "time_limit", "30, 12:00:00 or 2-00:00:00")
        limit_s = parse_time_limit_s(self.time_limit)
        _require(
            limit_s is None or limit_s > self.signal_before_limit_s + EARLY_S,
            "signal_before_limit_s",
            f"{self.signal_before_limit_s} s, and the minute by which Slurm may be early, leave no time to train within"
            f' time_limit "{self.time_limit}"; shorten the one or lengthen the other',
        )
        _require_match(MEMORY, self.memory, "memory", "900G, or 0 for all")
        if self.network_interface is not None:
            _require_match(INTERFACE, self.network_interface, "network_interface", "ib0 or ^lo,docker0")
        self._check_software()

    def _check_software(self) -> None:
        if self.venv is not None:
            _require_text(self.venv, "venv")
            _require(":" not in self.venv, "venv", "must not hold a colon, which PATH has between its folders")
        for module in self.modules:
            _require_match(WORD, module, "modules", "cuda/12.4")
        for name, value in self.environment.items():
            _require_match(VARIABLE, name, "environment", "NCCL_DEBUG")
            _require(name not in READ_ONLY, "environment", f"{name} belongs to the shell; leave it out")
            printable = value is None or value.isprintable()
            _require(printable, f"environment.{name}", "must be one line of printable text")
        for name in ("sbatch", "srun"):
            for option in getattr(self, name):
                shown = redact(option)
                _require(shown == option, name, f"{shown}: holds a secret, which everybody could see; use environment")
                _require_match(EXTRA, option, name, "--constraint=h100")
        for option in self.sbatch:
            self._check_sbatch(option)
        for option in self.srun:
            own, _, value = option[2:].partition("=")
            kept = len(own) < 3 or not "export".startswith(own) or value.split(",")[0] == "ALL"
            _require(kept, "srun", f"{option}: the ranks need the script's environment; write --export=ALL,...")

    def _check_sbatch(self, option: str) -> None:
        given = option[2:].partition("=")[0]
        # sbatch accepts the beginning of an option's name, too
        own = next((own for own in OWN_OPTIONS if own == given or (len(given) > 2 and own.startswith(given))), None)
        _require(own is None, "sbatch", f"{option}: the template sets --{own} itself; leave it out")
        other = next((other for other in FIELD_OF if len(given) > 1 and other.startswith(given)), None)
        _require(other is None, "sbatch", f"{option}: set it as {FIELD_OF.get(other or '')} instead")

    @property
    def tasks(self) -> int:
        """Ranks per node."""
        return self.gpus_per_node if self.tasks_per_node is None else self.tasks_per_node

    @property
    def plain_environment(self) -> dict[str, str]:
        """The variables that may stand in a script."""
        return {
            name: value
            for name, value in self.environment.items()
            if value is not None and redact_variable(name, value) == value
        }

    @property
    def secret_names(self) -> list[str]:
        """The variables that reach the job through the environment of sbatch, never through a file."""
        return sorted(self.environment.keys() - self.plain_environment.keys())

    def secret_environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """Values of `secret_names`; of those without a value here, the ones of a submission's environment.

        Raises:
            ConfigError: one has no value in either.
        """
        found = {}
        for name in self.secret_names:
            value = self.environment[name]
            value = given.get(name) if value is None else value
            if value is None:
                raise ConfigError(f"environment.{name}: is not set here; export it and rerun, or give it a value")
            found[name] = value
        return found

    @property
    def export(self) -> str | None:
        """What the job gets of the submission's environment, if `sbatch` says so: ALL, NONE or names."""
        given = (option[2:].partition("=") for option in self.sbatch)
        return next((value for name, _, value in given if len(name) > 2 and "export".startswith(name)), None)

    @property
    def cores_per_task(self) -> int:
        return self.cores_per_node // self.tasks


_TEXTS = {"container.image", "container.workdir"} | {
    each.name for each in dataclasses.fields(ClusterConfig) if each.type in (str, str | None)
}


def parse_time_limit_s(text: str) -> int | None:
    """Seconds of a time limit in one of sbatch's forms, which Slurm rounds up to minutes; None: no limit.

    Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    """
    days, dash, rest = text.rpartition("-")
    numbers = [int(each) for each in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *(*numbers, 0)[:2]
    total_s = ((int(days or "0") * 24 + hours) * 60 + minutes) * 60 + seconds
    return -(-total_s // 60) * 60 or None


def _require_match(pattern: re.Pattern[str], value: str, path: str, example: str) -> None:
    _require(bool(pattern.fullmatch(value)), path, f"{json.dumps(value)} is not written as {example}")


@functools.cache
def _validator() -> pydantic.TypeAdapter[ClusterConfig]:
    return pydantic.TypeAdapter(ClusterConfig)


def validate_cluster(tree: dict[str, Any]) -> ClusterConfig:
    """The tree as frozen dataclasses.

    Raises:
        ConfigError: an unknown key or an invalid value, in one line that names the field.
    """
    try:
        return _validator().validate_json(json.dumps(tree), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error)) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cluster: {error}; write the value as text or number") from error


def _explain(error: pydantic.ValidationError) -> str:
    """The first problem as one line."""
    first = error.errors()[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        return str(inner)
    shown = ".".join(map(str, first["loc"])) or "cluster"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        sections = {"container": ContainerConfig, "restart": RestartConfig}
        section = sections.get(str(first["loc"][0]), ClusterConfig) if len(first["loc"]) > 1 else ClusterConfig
        names = [each.name for each in dataclasses.fields(section)]
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        return f"{shown}: unknown key; {hint}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{shown}: is missing; give it a value"
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        return f"{shown}: must be text, but YAML made the number {first['input']} of it; put it in quotes"
    return f"{shown}: {first['msg'].replace('Input should be', 'must be')}, not {json.dumps(first['input'])[:80]}"


def load_cluster(name: str, assignments: Iterable[str] = ()) -> ClusterConfig:
    """The cluster config of this name (configs/cluster/) or path, with ``field=value`` overrides, validated.

    Raises:
        ConfigError: no such file, or something in it is wrong.
    """
    path = resolve(name, "cluster")
    try:
        given = [_quote_text(each) for each in assignments]
        return _expand_home(validate_cluster(override(read_tree(path), given, "--set-cluster")))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def _expand_home(cluster: ClusterConfig) -> ClusterConfig:
    """The config with the home folder in place of ~, which a script's quotes would keep as it is."""
    home, container = os.path.expanduser, cluster.container
    if container is not None:
        image, mounts = home(container.image), tuple(map(home, container.mounts))
        workdir = container.workdir and home(container.workdir)
        container = dataclasses.replace(container, image=image, mounts=mounts, workdir=workdir)
    return dataclasses.replace(cluster, venv=cluster.venv and home(cluster.venv), container=container)


def _quote_text(assignment: str) -> str:
    """`time_limit=12:00:00` with quotes: where a field takes text only, nobody need quote it for YAML and the shell."""
    path, equals, text = assignment.partition("=")
    first, _, rest = path.strip().partition(".")
    is_text = path.strip() in _TEXTS or (first == "environment" and bool(rest))
    looks_like_number = bool(re.fullmatch(r"[-+.\w:]+", text.strip())) and text.strip() not in ("null", "~")
    return f"{path}={json.dumps(text.strip())}" if equals and is_text and looks_like_number else assignment
