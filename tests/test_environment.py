"""The starter's variables: what they mean, and that nonsense in them is one line that names the variable."""

import pytest

from infini_train.cli import main
from infini_train.config.errors import ConfigError
from infini_train.environment import require_rank, restarts, world

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
)


@pytest.fixture
def environment(monkeypatch):
    """Sets these of the variables only."""

    def set_only(variables: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "0"}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4)),
        ({"LOCAL_RANK": "3"}, (0, 1)),  # a device of one process
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
    ],
)
def test_the_place_of_a_process(variables, expected, environment):
    environment(variables)
    assert world() == expected


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: "),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK: "),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: "),
        ({"RANK": "0", "WORLD_SIZE": "1e3"}, "WORLD_SIZE: "),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: "),
        ({"RANK": "0", "WORLD_SIZE": "\u0663"}, "WORLD_SIZE: "),
        ({"RANK": "0", "WORLD_SIZE": "\udcff"}, "WORLD_SIZE: "),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: "),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: "),
        ({"RANK": "2"}, "RANK: "),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1.0"}, "LOCAL_RANK: "),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK: "),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE: "),
        ({"SLURM_PROCID": "one", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_PROCID: "),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_PROCID: "),
        ({"SLURM_PROCID": "8", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_PROCID: "),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS: "),
    ],
)
def test_nonsense_is_one_line(variables, named, environment, capsys):
    environment(variables)
    with pytest.raises(ConfigError, match=f"^{named}"):
        world()
    with pytest.raises(SystemExit, match="2"):
        main(["train", "debug", "--print-config"])
    assert capsys.readouterr().err.startswith(f"error: {named}")


def test_a_rank_that_is_not_set_matters_only_where_several_processes_train(environment, capsys):
    """Some sites set WORLD_SIZE for everything."""
    environment({"WORLD_SIZE": "4"})
    main(["train", "debug", "--print-config"])
    assert "name: debug" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="^RANK: is not set, but WORLD_SIZE is 4; set both or neither$"):
        require_rank()


def test_the_number_of_restarts(monkeypatch):
    monkeypatch.setenv("INFINI_TRAIN_RESTARTS", "2")
    assert restarts() == 2
    monkeypatch.setenv("INFINI_TRAIN_RESTARTS", "two")
    with pytest.raises(ConfigError, match="^INFINI_TRAIN_RESTARTS: "):
        restarts()
