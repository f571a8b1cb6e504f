"""Identities of synthetic texts: what a checkpoint stores, so that a run resumes on the same texts only.

Version 2 is canonical JSON: the kind, the version of its texts, the tokenizer's hash, and all fields that differ from
their defaults. A field that is added later leaves every earlier identity as it was. So a default never changes, and a
kind whose texts come out differently for the same config gets a new text version (makers.py). Version 1, the repr of
the config class of its time, is still accepted for the kinds that had it. Imports no torch.
"""

import dataclasses
import json
from typing import Any

from infini_train.config.data import SyntheticConfig
from infini_train.data.synthetic.makers import MAKERS
from infini_train.data.tokenizer import Tokenizer

FORMAT_VERSION = 2
_ELSEWHERE = {"kind", "tokenizer"}  # a tokenizer's file may move; its hash is part of the identity

# Version 1: the class and all fields of its time, in their order; see also `identify_1`.
_CLASSES_1 = {"passkey": "PasskeyConfig", "needles": "NeedlesConfig", "recall": "RecallConfig"}
_FIELDS_1 = {
    "passkey": "wording varied_filler varied_wording digits few_digits_below_loss min_segments grow_below_loss"
    " text_weight answer_weight key_weight pressure pressure_share",
    "needles": "tasks haystack tokenizer needles questions digits min_segments grow_below_loss text_weight"
    " answer_weight pressure pressure_share",
    "recall": "min_pairs max_pairs joined grow_below_loss",
}


def identify(config: SyntheticConfig, tokenizer: Tokenizer) -> str:
    """The identity of the texts in the present version: equal for the same texts, the seed aside."""
    tree = {
        "format": FORMAT_VERSION,
        "kind": config.kind,
        "texts": MAKERS[config.kind].text_version,
        "tokenizer": tokenizer.sha256,
        "fields": _changed_fields(config),
    }
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def identify_1(config: SyntheticConfig, tokenizer: Tokenizer) -> str | None:
    """The identity in version 1; None if it had none.

    That is so for kinds that were added later, and if a field that was added later is not at its default.
    """
    if config.kind not in _FIELDS_1:
        return None
    fields = _FIELDS_1[config.kind].split()
    if not set(_changed_fields(config)) <= set(fields):
        return None
    values = {field: getattr(config, field) for field in fields}
    ending = ""
    if config.kind == "passkey" and not values["varied_wording"]:
        del values["varied_wording"]
    if config.kind == "recall":
        ending = "" if values.pop("joined") else ", two tokens a pair"
    if config.kind == "needles":
        values["tokenizer"], ending = None, f" {tokenizer.sha256}"
    shown = ", ".join(f"{field}={value!r}" for field, value in values.items())
    version = " 2" if config.kind == "needles" else ""
    return f"{config.kind}{version} {_CLASSES_1[config.kind]}({shown}){ending}"


def _changed_fields(config: SyntheticConfig) -> dict[str, Any]:
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _ELSEWHERE and getattr(config, field.name) != field.default
    }
