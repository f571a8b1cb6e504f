"""Cluster configs: what is wrong is said in one line that names the field."""

from pathlib import Path

import pytest

from infini_train.config.errors import ConfigError
from launch.cluster import load_cluster, parse_time_limit_s, validate_cluster

LEAST = {"gpus_per_node": 8, "cores_per_node": 96}


@pytest.mark.parametrize("name", ["plain", "pyxis", "h100"])
def test_the_shipped_ones_load(name: str) -> None:
    assert load_cluster(name).tasks == 8


def test_the_least_is_enough() -> None:
    cluster = validate_cluster(LEAST)
    assert (cluster.tasks, cluster.cores_per_task, cluster.partition) == (8, 12, None)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"gpus_per_node": 8}, "cores_per_node: is missing; give it a value"),
        ({**LEAST, "partitio": "a"}, "partitio: unknown key; did you mean partition?"),
        ({**LEAST, "restart": {"max_retry": 1}}, "restart.max_retry: unknown key; did you mean max_retries?"),
        ({**LEAST, "gpus_per_node": 0}, "tasks_per_node: must be positive (it is gpus_per_node if not given)"),
        ({**LEAST, "cores_per_node": 4}, "cores_per_node: 4 cores don't suffice for 8 tasks"),
        (
            {**LEAST, "time_limit": 43200},
            "time_limit: must be text, but YAML made the number 43200 of it; put it in quotes",
        ),
        ({**LEAST, "time_limit": "12h"}, 'time_limit: "12h" is not written as 30, 12:00:00 or 2-00:00:00'),
        ({**LEAST, "memory": "lots"}, 'memory: "lots" is not written as 900G, or 0 for all'),
        ({**LEAST, "sbatch": ["--nodes=3"]}, "sbatch: --nodes=3: the template sets --nodes itself; leave it out"),
        ({**LEAST, "sbatch": ["-N 3"]}, 'sbatch: "-N 3" is not written as --constraint=h100'),
        ({**LEAST, "environment": {"A B": "c"}}, 'environment: "A B" is not written as NCCL_DEBUG'),
        (
            {**LEAST, "venv": "v", "container": {"image": "i"}},
            "venv: can't be used inside a container; give one of the two",
        ),
        ({**LEAST, "signal_before_limit_s": 0}, "signal_before_limit_s: must be positive"),
        ({**LEAST, "environment": {"UID": "1"}}, "environment: UID belongs to the shell; leave it out"),
        ({**LEAST, "venv": "/a:b"}, "venv: must not hold a colon, which PATH has between its folders"),
        ({**LEAST, "sbatch": ["--time=2"]}, "sbatch: --time=2: set it as time_limit instead"),
        ({**LEAST, "sbatch": ["--ti=2"]}, "sbatch: --ti=2: set it as time_limit instead"),
        ({**LEAST, "sbatch": ["--job-name=a"]}, "sbatch: --job-name=a: set it as name of the run's config instead"),
        ({**LEAST, "sbatch": ["--sig=R"]}, "sbatch: --sig=R: the template sets --signal itself; leave it out"),
        (
            {**LEAST, "srun": ["--export=NONE"]},
            "srun: --export=NONE: the ranks need the script's environment; write --export=ALL,...",
        ),
    ],
)
def test_mistakes_are_named(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_cluster(tree)
    assert str(caught.value) == message


def test_a_file_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("gpus_per_node: 8\ncores_per_node: many\n")
    with pytest.raises(ConfigError, match=rf"^{path}: cores_per_node: must be a valid integer, not \"many\"$"):
        load_cluster(str(path))
    with pytest.raises(ConfigError, match="^plane: no cluster config of this name; did you mean "):
        load_cluster("plane")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2", 120),
        ("0:30", 60),
        ("1:30", 120),
        ("90:00", 5400),
        ("1:00:00", 3600),
        ("0:05:30", 360),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("2-00:00:01", 172860),
        ("0", None),
        ("0:00", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    """Rounded up to minutes; 0 is no limit."""
    assert parse_time_limit_s(text) == seconds


@pytest.mark.parametrize(
    ("limit", "signal_s"),
    [("2", 300), ("5", 300), ("6", 300), ("0:30", 30), ("5:00", 300), ("0:06:00", 300), ("0-0:5", 299)],
)
def test_a_signal_that_leaves_no_time_is_refused(limit: str, signal_s: int) -> None:
    """Such a job would be told to stop as it starts, and be requeued for ever. Slurm may be a minute early."""
    tree = {**LEAST, "time_limit": limit, "signal_before_limit_s": signal_s}
    with pytest.raises(ConfigError, match=rf'^signal_before_limit_s: {signal_s} s, .* within time_limit "{limit}"; '):
        validate_cluster(tree)


@pytest.mark.parametrize(("limit", "signal_s"), [("7", 300), ("0", 300), ("2", 59), ("0:06:01", 300), ("1-0", 65535)])
def test_a_signal_that_leaves_some_time_is_taken(limit: str, signal_s: int) -> None:
    assert validate_cluster({**LEAST, "time_limit": limit, "signal_before_limit_s": signal_s}).time_limit == limit


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("time_limit=12:00:00", "time_limit", "12:00:00"),
        ("time_limit=30", "time_limit", "30"),
        ('time_limit="12:00:00"', "time_limit", "12:00:00"),
        ("time_limit = 2-00:00:00 ", "time_limit", "2-00:00:00"),
        ("memory=0", "memory", "0"),
        ("account=2026", "account", "2026"),
        ("account=1e5", "account", "1e5"),
        ("qos=on", "qos", "on"),
        ("account=null", "account", None),
        ("account=~", "account", None),
        ("environment.OMP_NUM_THREADS=4", "environment", {"OMP_NUM_THREADS": "4"}),
        ("environment={A: '1'}", "environment", {"A": "1"}),
        ("cores_per_node=64", "cores_per_node", 64),
        ("requeue=false", "requeue", False),
    ],
)
def test_a_text_on_the_command_line_needs_no_second_quotes(assignment: str, field: str, value: object) -> None:
    assert getattr(load_cluster("plain", [assignment]), field) == value


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's quotes would keep it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_cluster("plain", ["venv=~/venv"]).venv == f"{tmp_path}/venv"
    settings = ["container.image=~/a.sqsh", "container.mounts=[~/data:/data]", "container.workdir=~/w"]
    container = load_cluster("pyxis", settings).container
    assert container is not None
    assert (container.image, container.mounts) == (f"{tmp_path}/a.sqsh", (f"{tmp_path}/data:/data",))
    assert container.workdir == f"{tmp_path}/w"
