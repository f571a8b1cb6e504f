"""Where the validation data of a run are looked for."""

from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from infini_train.config.run import RunConfig
from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.eval.validation import find_validation, open_data


def trained(run_dir: object, validation: object) -> RunConfig:
    return load_run("debug", [f"run_dir={run_dir}", f"data.validation={validation}"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; the run was trained in `there`."""
    for folder in ("here", "there/runs/a/held", "there/shards/held"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_path_as_given_comes_first(here: Path) -> None:
    (here / "shards" / "held").mkdir(parents=True)
    run_dir = here.parent / "there" / "runs" / "a"
    assert find_validation(trained("runs/a", "shards/held"), run_dir) == "shards/held"
    absolute = here.parent / "there" / "shards" / "held"
    assert find_validation(trained("runs/a", absolute), Path("/nowhere/b")) == str(absolute)


@pytest.mark.parametrize("validation", ["shards/held", "runs/a/held"])
def test_then_the_folder_where_the_run_was_trained(here: Path, validation: str) -> None:
    run_dir = here.parent / "there" / "runs" / "a"
    assert find_validation(trained("runs/a", validation), run_dir) == str(here.parent / "there" / validation)


@pytest.mark.parametrize("was", ["runs/a", "/old/place/a"])
def test_data_inside_a_run_move_with_it(here: Path, was: str) -> None:
    moved = (here.parent / "there" / "runs" / "a").rename(here.parent / "moved")
    assert find_validation(trained(was, f"{was}/held"), moved) == str(moved / "held")


def test_whatever_is_nowhere_is_told_in_one_line(here: Path) -> None:
    run_dir = here.parent / "there" / "runs" / "a"
    with pytest.raises(ConfigError) as caught:
        find_validation(trained("runs/a", "none"), run_dir)
    looked = f"none, {here.parent / 'there' / 'none'}"
    assert str(caught.value) == (
        f"data.validation: the run's validation data were not found (looked for {looked}); name a folder with --data"
    )
    with pytest.raises(ConfigError, match=r"^--data: the run has no validation data"):
        config = load_run("debug", ["data.validation=null", "eval.every_steps=null"])
        find_validation(config, run_dir)


def test_results_name_a_url_without_its_password(tmp_path: Path) -> None:
    """A run of before may have one in its config; results are kept in its folder."""
    with ShardWriter(tmp_path / "shards", ByteTokenizer()) as writer:
        writer.add(np.arange(9), n_bytes=9, id="a")
    url = "memory://user:SeCrEt@host/held"
    files, root = fsspec.core.url_to_fs(url)
    for path in (tmp_path / "shards").iterdir():
        files.pipe_file(f"{root}/{path.name}", path.read_bytes())
    config = load_run("debug", ["data.train=x", f"data.cache_dir={tmp_path / 'cache'}"])
    trained = SimpleNamespace(checkpoint="runs/a/checkpoints/step-1", config=config, tokenizer=ByteTokenizer())
    name, dataset = open_data(trained, url)
    assert len(dataset) == 1 and name == "memory://user:***@host/held"
