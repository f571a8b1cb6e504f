"""Cluster configs: what is wrong is said in one line that names the field."""

from pathlib import Path

import pytest

from infini_train.config.errors import ConfigError
from launch.cluster import load_cluster, validate_cluster

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
