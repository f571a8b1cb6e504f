"""Which fields of the config may differ between a checkpoint and the run that uses it; all others are refused."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from infini_train.config.attention import KINDS, MixedConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import to_tree, validate

Tree = Mapping[str, Any]
ATTENTION = "model.attention"
KIND = f"{ATTENTION}.kind"
LAYER = "layer "  # in the path of a field of one layer's attention: model.attention.layer 3.update

# path (a section: all of its fields) -> why a resumed run may change it; attention variants add theirs (`initial`)
_RESUMABLE: Mapping[str, str] = {
    "name": "names the run only",
    "run_dir": "names the run's folder only",
    "device": "computes the same on another: equal up to rounding",
    "guard": "judges the steps from here on",
    "log": "changes what is shown, not what is trained",
    "eval": "validation has a memory of its own and no influence on training",
    "checkpoint": "changes when states are saved, not the states",
    "data.train": "a path; the shards themselves are compared by their hashes",
    "data.mixture": "paths; one hash of shards, weights and epochs is compared",
    "data.synthetic.tokenizer": "a path; the tokenizer itself is compared by its hash",
    "data.cache_dir": "a folder for copies",
    "data.max_corrupt_documents": "decides when to give up, not what is read",
    "data.validation": "no influence on training",
    "train.max_steps": "the learning rates follow the schedule of the new length from here on",
    "train.max_tokens": "the learning rates follow the schedule of the new length from here on",
    "parallel": "divides the same numbers in another way: equal up to rounding",
    "train.micro_batch_lanes": "sums are taken in another order: equal up to rounding",
    "train.activation_checkpointing": "trades memory for time; the numbers are the same",
    "train.init_from": "read only when a run starts anew",
    "model.init_std": "for initial values; the checkpoint's weights are used",
}

# paths below model -> why a model with the same weights may differ in them; variants add theirs (`same_weights`)
_SAME_WEIGHTS: Mapping[str, str] = {
    KIND: "all kinds share their weights; gates, convolutions and memory tokens begin with their initial values",
    "model.init_std": "for initial values; the checkpoint's weights are used",
}


def resumable_fields(kinds: Collection[str] | None = None) -> dict[str, str]:
    """Path of a field or section -> why a resumed run may change it; for these kinds of attention, or any."""
    return {**_RESUMABLE, **_of_variants("initial", kinds)}


def same_weight_fields(kinds: Collection[str] | None = None) -> dict[str, str]:
    """Path of a field -> why a model with the same weights may differ in it; for these kinds of attention, or any."""
    return {**_SAME_WEIGHTS, **_of_variants("same_weights", kinds), **_of_variants("initial", kinds)}


def check_resumable(saved_tree: Tree, new_tree: Tree) -> list[str]:
    """One line for each harmless difference between a checkpoint's config and the run that resumes it.

    Raises:
        ConfigError: names the first field that a resumed run can't change, its two values, and what to do.
    """
    notes: list[str] = []
    table = resumable_fields(_kinds(saved_tree, new_tree))
    for path, old, new in _differences(saved_tree, new_tree):
        reason = _lookup(table, path)
        if reason is None:
            raise ConfigError(
                f"{path}: is {_show(new)} here and {_show(old)} in the checkpoint, and a resumed run can't change it;"
                " set it back, or start a new run with train.init_from"
            )
        notes.append(f"{path}: {_show(old)} -> {_show(new)} ({reason})")
    return notes


def check_same_data(saved_hash: str, new_hash: str, path: str) -> None:
    """Refuses to resume on other training data; data.train may move, its tokenizer and shards must stay.

    Raises:
        ConfigError: the two hashes differ.
    """
    if saved_hash != new_hash:
        raise ConfigError(
            f"data.train: {path} is not the data that the checkpoint was trained on (tokenizer, shards or mixture"
            " differ); give the original shards, or start a new run with train.init_from, as where this version makes"
            " texts in another way"
        )


def check_same_model(saved_tree: Tree, new_tree: Tree, source: str = "the checkpoint") -> None:
    """Whether a checkpoint's weights (`source` names it in the message) fit the model of another run or evaluation.

    Raises:
        ConfigError: names the first field of the model that differs.
    """
    differences = _differences(saved_tree, new_tree)
    of_other_kind = tuple(path.removesuffix("kind") for path, *_ in differences if _without_layer(path) == KIND)
    table = same_weight_fields(_kinds(saved_tree, new_tree))
    adding = {f"{ATTENTION}.{name}": none for kind in KINDS.values() for name, none in kind.adds_parameters.items()}
    for path, old, new in differences:
        if (field := _without_layer(path)) in adding and old in (_ABSENT, adding[field]):
            continue  # the new parameters have their initial values
        if field not in adding and path.startswith(of_other_kind):
            continue  # what one kind has of its own is no difference in what both have
        if path.startswith("model.") and _lookup(table, path) is None:
            raise ConfigError(f"{source} is of another model: {path} is {_show(old)} there and {_show(new)} here")


def _of_variants(table: str, kinds: Collection[str] | None) -> dict[str, str]:
    """Two variants may give one name to fields of different meaning."""
    variants = [variant for kind, variant in KINDS.items() if kinds is None or kind in kinds]
    return {f"{ATTENTION}.{field}": why for variant in variants for field, why in getattr(variant, table).items()}


def _kinds(*trees: Tree) -> set[str] | None:
    """The kinds of attention of these configs, and of their layers; None if one does not say."""
    attentions = [tree.get("model", {}).get("attention", {}) for tree in trees]
    named = [attention.get("variants") for attention in attentions]
    layers = [variant for variants in named if isinstance(variants, Mapping) for variant in variants.values()]
    kinds = {attention.get("kind") for attention in (*attentions, *layers)}
    return None if None in kinds else kinds


def _lookup(table: Mapping[str, str], path: str) -> str | None:
    """The reason given for the field or for a section it lies in; all layers share the reasons."""
    parts = _without_layer(path).split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((table[prefix] for prefix in prefixes if prefix in table), None)


def _without_layer(path: str) -> str:
    return re.sub(rf"^({re.escape(ATTENTION)}\.){LAYER}\d+\.", r"\1", path)


def _differences(saved_tree: Tree, new_tree: Tree) -> list[tuple[str, Any, Any]]:
    """(path, old, new) of the fields that differ, in the order of the schema; an attention's kind before its fields."""
    saved_tree, new_tree = _complete(saved_tree, new_tree)
    old, new = _flatten(saved_tree), _flatten(new_tree)
    paths = [path for path in {**new, **old} if old.get(path, _ABSENT) != new.get(path, _ABSENT)]
    paths.sort(key=lambda path: not path.endswith(".kind"))
    return [(path, old.get(path, _ABSENT), new.get(path, _ABSENT)) for path in paths]


_ABSENT = object()


def _complete(*trees: Tree) -> tuple[Tree, ...]:
    """The trees with defaults for fields that were added to the schema later, and the model's null sizes resolved."""
    try:
        runs = [validate(tree) for tree in trees]
    except ConfigError:  # written for a schema that this one can't read: compare what is written
        return trees
    completed = []
    is_mixed = any(isinstance(run.model.attention, MixedConfig) for run in runs)
    for run in runs:
        model = run.model
        sizes = {"num_kv_heads": model.kv_heads, "head_dim": model.key_dim, "value_head_dim": model.value_dim}
        tree = to_tree(run)
        if is_mixed:  # what each layer has counts, not what it is called
            variants = enumerate(model.layers)
            tree["model"]["attention"] = {f"{LAYER}{number}": to_tree(variant) for number, variant in variants}
        completed.append({**tree, "model": {**tree["model"], **sizes}})
    return tuple(completed)


def _flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)
