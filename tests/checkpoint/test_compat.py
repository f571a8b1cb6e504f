"""Every field of the schema is decided: a resumed run may change it for a stated reason, or it is refused by name."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import pytest

from infini_train.checkpoint.compat import (
    check_resumable,
    check_same_data,
    check_same_model,
    resumable_fields,
    same_weight_fields,
)
from infini_train.config.attention import KINDS, FullConfig, InfiniConfig, LocalConfig
from infini_train.config.data import SYNTHETIC_KINDS, SyntheticConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import override, to_tree, validate
from infini_train.config.run import RunConfig
from infini_train.config.variant import AttentionVariant

SHORT = {
    "model": {"vocab_size": 64, "hidden_size": 256, "num_layers": 1, "num_heads": 2, "ffn_size": 32},
    "data": {"train": "a"},
    "train": {"window_tokens": 512, "batch_lanes": 4, "max_steps": 1000},
}
BASE = to_tree(validate(SHORT))
RESUMABLE, SAME_WEIGHTS = resumable_fields(), same_weight_fields()


def leaf_paths(section: Any, prefix: str = "") -> list[str]:
    """Dotted paths of all fields below a config dataclass, of every variant of a union."""
    paths: list[str] = []
    hints = typing.get_type_hints(section)
    tables = {AttentionVariant: KINDS, SyntheticConfig: SYNTHETIC_KINDS}
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(section)):
        members = typing.get_args(hint) or (hint,)  # of an optional section
        variants = [variant for each in members for variant in tables.get(each, {"": each}).values()]
        is_named = typing.get_origin(hint) is Mapping  # name -> attention, whose fields are known
        sections = [variant for variant in variants if dataclasses.is_dataclass(variant) and not is_named]
        for variant in sections:
            paths += leaf_paths(variant, f"{prefix}{name}.")
        if not sections:
            paths.append(f"{prefix}{name}")
    return list(dict.fromkeys(paths))


LEAVES = leaf_paths(RunConfig)


def allowed_by(table: typing.Mapping[str, str], path: str) -> bool:
    return any(path == entry or path.startswith(f"{entry}.") for entry in table)


def changed(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two trees that differ in this field only; too odd for the schema, so that no rule between fields interferes."""
    return tuple(override({}, [f"{path}={value}"]) for value in ("old", "new"))  # type: ignore[return-value]


def test_the_walk_finds_all_sections() -> None:
    assert {"seed", "optim.lr", "model.attention.overlap_tokens", "log.profile_steps"} <= set(LEAVES)
    for variant in (InfiniConfig, LocalConfig, FullConfig):
        assert {f"model.attention.{field.name}" for field in dataclasses.fields(variant)} <= set(LEAVES)


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_is_in_the_table_or_refused(path: str) -> None:
    saved, new = changed(path)
    if allowed_by(RESUMABLE, path):
        (note,) = check_resumable(saved, new)
        assert note.startswith(f"{path}: old -> new (")
    else:
        with pytest.raises(ConfigError, match=rf"^{path}: is new here and old in the checkpoint, .* train\.init_from$"):
            check_resumable(saved, new)


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_of_the_model_decides_whether_weights_fit(path: str) -> None:
    saved, new = changed(path)
    if path.startswith("model.") and not allowed_by(SAME_WEIGHTS, path):
        with pytest.raises(ConfigError, match=rf"^x is of another model: {path} is old there and new here$"):
            check_same_model(saved, new, "x")
    else:
        check_same_model(saved, new, "x")


@pytest.mark.parametrize("table", [RESUMABLE, SAME_WEIGHTS])
def test_tables_name_only_fields_that_exist(table: typing.Mapping[str, str]) -> None:
    for entry in table:
        assert any(path == entry or path.startswith(f"{entry}.") for path in LEAVES), entry


def test_what_decides_the_numbers_is_refused() -> None:
    for path in ("seed", "optim.lr", "optim.schedule", "train.precision", "train.batch_lanes", "model.hidden_size"):
        assert not allowed_by(RESUMABLE, path)


def test_equal_runs_resume_without_notes() -> None:
    assert check_resumable(BASE, BASE) == []
    check_same_model(BASE, BASE)


def test_values_are_shown_and_the_first_refused_field_named() -> None:
    new = override(BASE, ["train.max_steps=2000", "optim.lr=1e-3", "name=other"])
    with pytest.raises(ConfigError, match=r"^optim\.lr: is 0\.001 here and 0\.0003 in the checkpoint"):
        check_resumable(BASE, new)
    notes = check_resumable(BASE, override(BASE, ["train.max_steps=2000", "name=other"]))
    assert sorted(note.split(":")[0] for note in notes) == ["name", "train.max_steps"]
    assert any(note.startswith("train.max_steps: 1000 -> 2000 (") for note in notes)


def test_a_default_written_out_is_no_difference() -> None:
    written = override(BASE, ["model.num_kv_heads=2", "model.head_dim=128"])
    for left, right in ((SHORT, written), (written, SHORT), (SHORT, BASE)):
        assert check_resumable(left, right) == []
        check_same_model(left, right)


def test_another_kind_of_attention_is_another_run_with_the_same_weights() -> None:
    full = override(BASE, ["model.attention={kind: full}"])
    memorizing = override(BASE, ["model.attention={kind: memorizing, layer: 0}"])
    for left, right in ((BASE, full), (full, BASE), (full, memorizing)):
        check_same_model(left, right)
        with pytest.raises(ConfigError, match=r"model\.rope_theta is 10000\.0 there and 5\.0 here$"):
            check_same_model(left, override(right, ["model.rope_theta=5.0"]))
    with pytest.raises(ConfigError, match=r"model\.attention\.layer is 0 there and null here$"):
        check_same_model(memorizing, override(memorizing, ["model.attention.layer=null"]))
    with pytest.raises(ConfigError, match=r"^model\.attention\.kind: is full here and infini in the checkpoint"):
        check_resumable(BASE, full)


def test_update_rules_share_their_weights_but_a_run_keeps_its_own() -> None:
    delta = override(BASE, ["model.attention.update=delta", "model.attention.overlap_tokens=16"])
    check_same_model(BASE, delta)
    with pytest.raises(ConfigError, match=r"^model\.attention\.update: is delta here and linear"):
        check_resumable(BASE, delta)


def test_the_model_of_another_run_may_differ_in_everything_else() -> None:
    check_same_model(BASE, override(BASE, ["train.batch_lanes=8", "optim.lr=1.0", "data.train=b", "seed=5"]))
    with pytest.raises(ConfigError, match=r"model\.hidden_size is 256 there and 512 here"):
        check_same_model(BASE, override(BASE, ["model.hidden_size=512"]))


def test_training_data_may_move_but_not_change() -> None:
    check_same_data("abc", "abc", "data/moved")
    with pytest.raises(ConfigError, match=r"^data\.train: data/other is not the data"):
        check_same_data("abc", "abd", "data/other")
