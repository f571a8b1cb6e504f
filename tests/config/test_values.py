"""Limits of fields: every number has bounds, every path may begin with ~."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from infini_train.config.attention import KINDS
from infini_train.config.data import SYNTHETIC_KINDS, NeedlesConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, override, read_tree, validate
from infini_train.config.run import RunConfig
from tests.config.conftest import BASE, write

PATHS = ("run_dir", "data.train", "data.validation", "data.cache_dir", "train.init_from")


@pytest.mark.parametrize("field", PATHS)
def test_a_tilde_is_the_home_folder(base: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setenv("HOME", "/tmp/mine")
    config = load_run(str(base), [f"{field}=~/x"])
    for name in field.split("."):
        config = getattr(config, name)
    assert config == "/tmp/mine/x"


def test_a_tilde_inside_sections_and_includes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "base.yaml", BASE)
    write(tmp_path / "own.yaml", "include: [~/base.yaml]\n")
    config = load_run("~/own.yaml", ["data={train: null, mixture: [{folder: ~/a}, {folder: 's3://~/b'}]}"])
    assert [part.folder for part in config.data.mixture] == [str(tmp_path / "a"), "s3://~/b"]
    synthetic = load_run("~/own.yaml", ["data={train: null, synthetic: {kind: needles, haystack: ~/h.txt}}"]).data
    assert isinstance(synthetic.synthetic, NeedlesConfig) and synthetic.synthetic.haystack == f"{tmp_path}/h.txt"


def number_fields(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, type) of every field of the schema that holds numbers."""
    for name, kind in get_type_hints(schema).items():
        if name not in {f.name for f in dataclasses.fields(schema)}:
            continue  # a class variable
        path, variants = f"{prefix}{name}", {"model.attention": KINDS, "data.synthetic": SYNTHETIC_KINDS}
        members = variants[path].values() if path in variants else (kind, *get_args(kind))
        found = [each for each in members if dataclasses.is_dataclass(each)]
        for each in found:
            yield from number_fields(each, f"{path}.{getattr(each, 'kind', '')}.".replace("..", "."))
        if not found and {int, float} & {kind, *get_args(kind)}:
            yield path, kind


NUMBERS = dict(number_fields(RunConfig))


def test_all_numbers_are_found() -> None:
    assert len(NUMBERS) > 80
    assert {"model.hidden_size", "model.rope_scaling.factor", "model.attention.infini.gate_init"} <= set(NUMBERS)
    assert {"data.synthetic.recall.max_pairs", "data.mixture.weight", "log.profile_steps", "seed"} <= set(NUMBERS)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    write(path, BASE)
    return read_tree(path)


def setting(field: str, value: str) -> str:
    """The override that gives a field this value, and the others of its section what they need."""
    section, _, name = field.rpartition(".")
    kind = section.rpartition(".")[2]
    if get_origin(NUMBERS[field]) is tuple:
        value = f"[{value}]"
    needed = {
        "data.mixture": {"folder": "a"},
        "data.curriculum": {"tokens": "1", "max_document_tokens": "1"},
        "model.rope_scaling": {"factor": "4"},
        "model.attention.memorizing": {"kind": "memorizing", "cache_tokens": "0"},
        "train": {"max_steps": "null" if name == "max_tokens" else "20"},
    }.get(section, {"kind": kind} if section.startswith(("data.synthetic.", "model.attention.")) else {})
    inner = ", ".join(f"{key}: {each}" for key, each in {**needed, name: value}.items())
    if section in ("data.mixture", "data.curriculum"):
        return f"data={{train: {'null' if name in ('weight', 'epochs') else 'a'}, {section[5:]}: [{{{inner}}}]}}"
    if section.startswith("data.synthetic."):
        return f"data={{train: null, synthetic: {{{inner}}}}}"
    if section.startswith("model.attention."):
        return f"model.attention={{{inner}}}"
    return f"{section}={{{inner}}}" if section else f"{field}={value}"


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_has_bounds(tree: dict[str, Any], field: str) -> None:
    """Nothing that only an overflow would refuse is let through."""
    whole = {int} & {NUMBERS[field], *get_args(NUMBERS[field])}
    for number in (str(2**62), str(-(2**62)), "1.5") if whole else ("1.0e+300", "-1.0e+300", ".inf", ".nan"):
        with pytest.raises(ConfigError) as caught:
            validate(override(tree, [setting(field, number)]))
        assert field.rpartition(".")[2] in str(caught.value), number
