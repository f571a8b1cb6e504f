"""The edge between a run's config and its text: mistakes found below are named by the field they came from."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from infini_train.config.errors import ConfigError, naming
from infini_train.config.files import load_run
from infini_train.data.source import open_reader, open_source
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.data.writer import ShardWriter


def write(folder: Path) -> Path:
    with ShardWriter(folder, ByteTokenizer()) as writer:
        writer.add(np.arange(9), n_bytes=9, id="x")
    return folder


def open_text(run: str, *settings: str) -> None:
    config = load_run(run, settings)
    open_reader(open_source(config), config, slice(None), print)


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("debug", ["data.train={there}/none"], "data.train: .*none: no such dataset folder"),
        (
            "debug",
            ["data={{train: null, mixture: [{{folder: {there}}}, {{folder: {there}}}]}}"],
            "data.mixture: .* is there twice; give it once, with a larger weight",
        ),
        ("passkey", ["data.synthetic.wording=papr"], "data.synthetic.wording: papr: no such wording; choose one of"),
        ("passkey", ["data.synthetic.min_segments=1"], "data.synthetic.min_segments: 1 segments of 64 tokens can't"),
        (
            "needles",
            ["data.synthetic.tokenizer=null", "data.synthetic.haystack={there}/none.txt"],
            r"data.synthetic.haystack: .*none.txt can't be read \(No such file or directory\); give repeated, varied",
        ),
        ("needles", ["data.synthetic.tokenizer={there}/none.model"], "data.synthetic.tokenizer: .*can't be read"),
        ("recall", ["train.window_tokens=208"], "data.synthetic.max_pairs: 128 pairs and their questions take"),
    ],
)
def test_a_mistake_is_named_by_its_field(run: str, settings: list[str], message: str, tmp_path: Path) -> None:
    there = write(tmp_path / "data")
    with pytest.raises(ConfigError, match=f"^{message}"):
        open_text(run, *(setting.format(there=there) for setting in settings))


def test_naming_adds_the_field_and_the_advice() -> None:
    with pytest.raises(ConfigError, match=r"^--only: no such case; see --list$"), naming("--only", "see --list"):
        raise ConfigError("no such case")
    with pytest.raises(ZeroDivisionError), naming("--only"):
        raise ZeroDivisionError
    with naming("--only"):
        pass


def test_synthetic_texts_have_no_corpus() -> None:
    source = open_source(load_run("recall"))
    assert source.corpus is None and source.name == "data.synthetic"
    assert dataclasses.replace(source, earlier_identities=("a",)).upgrade_identity("a") == source.identity
    assert source.upgrade_identity("a") == "a"
