"""Runs of the self-test's program, done once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infini_train.config.run import RunConfig
from infini_train.selftest.cases import Case, configure, parse_layout, reference_of


@pytest.fixture(scope="session")
def run_one(process_groups: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of the single process's run; `name` tells runs of one config apart."""
    from infini_train.selftest.program import run_program

    def run(name: str, attention: str = "linear", precision: str = "fp32") -> Path:
        case = Case(parse_layout("one"), attention, precision=precision)  # type: ignore[arg-type]
        config: RunConfig = reference_of(configure(case, tmp_path_factory.mktemp(name)))
        run_program(config)
        return config.directory

    return run


@pytest.fixture(scope="session")
def reference(run_one: Callable[..., Path]) -> Path:
    """The linear one in fp32."""
    return run_one("reference")
