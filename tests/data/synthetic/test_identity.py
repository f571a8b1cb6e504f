"""Which texts a checkpoint may go on with: the present identity, and those that earlier versions stored."""

import dataclasses
import json
from pathlib import Path

import pytest

from infini_train.checkpoint.compat import check_resumable, check_same_data
from infini_train.config.data import BabilongConfig, NeedlesConfig, PasskeyConfig, RecallConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, to_tree, validate
from infini_train.data.source import open_source
from infini_train.data.synthetic.identity import identify, identify_1
from infini_train.data.tokenizer import ByteTokenizer

MODELS = Path(__file__).parents[3] / "models"
BYTE = ByteTokenizer()
EARLIER = {
    "passkey_no_conv_delta": "passkey PasskeyConfig(wording='paper', varied_filler=True, digits=5,"
    " few_digits_below_loss=0.25, min_segments=5, grow_below_loss=0.03, text_weight=0.0, answer_weight=1.0,"
    " key_weight=0.5, pressure=8192.0, pressure_share=0.5)",
    "passkey": "passkey PasskeyConfig(wording='paper', varied_filler=True, varied_wording=True, digits=5,"
    " few_digits_below_loss=0.25, min_segments=5, grow_below_loss=0.03, text_weight=0.0, answer_weight=1.0,"
    " key_weight=0.5, pressure=8192.0, pressure_share=0.5)",
    "recall": "recall RecallConfig(min_pairs=2, max_pairs=128, grow_below_loss=10.0)",
}
LATER_NEEDLES = {"min_digits": 2, "varied_wording": True}  # fields that came after version 1
CHANGES = {
    PasskeyConfig: {
        **{
            "wording": "vault",
            "varied_filler": True,
            "varied_wording": True,
            "digits": 6,
            "few_digits_below_loss": 1.0,
        },
        **{"min_segments": 4, "grow_below_loss": 1.0, "text_weight": 0.5, "answer_weight": 0.5, "key_weight": 0.25},
        **{"pressure": 2.0, "pressure_share": 0.25},
    },
    NeedlesConfig: {
        **{"tasks": ("single",), "haystack": "repeated", "needles": 5, "questions": 2, "digits": 6, "min_segments": 5},
        **{"grow_below_loss": 1.0, "text_weight": 0.5, "answer_weight": 0.5, "pressure": 2.0, "pressure_share": 0.25},
        **LATER_NEEDLES,
    },
    RecallConfig: {"min_pairs": 3, "max_pairs": 33, "joined": False, "grow_below_loss": 1.0},
    BabilongConfig: {
        **{"tasks": ("qa2",), "haystack": "repeated", "max_facts": 11, "questions": 2, "min_segments": 5},
        **{"grow_below_loss": 1.0, "text_weight": 0.5, "answer_weight": 0.5, "pressure": 2.0, "pressure_share": 0.25},
    },
}


@pytest.mark.parametrize("name", EARLIER)
def test_a_run_of_before_goes_on(name):
    source = open_source(load_run(name))
    assert source.upgrade_identity(EARLIER[name]) == source.identity != EARLIER[name]
    others = set(EARLIER.values()) - {EARLIER[name]}
    assert all(source.upgrade_identity(other) == other for other in others)


def test_pairs_of_two_tokens_had_an_ending_of_their_own():
    source = open_source(load_run("recall", ["data.synthetic.joined=false", "train.window_tokens=528"]))
    assert source.upgrade_identity(EARLIER["recall"] + ", two tokens a pair") == source.identity
    assert source.upgrade_identity(EARLIER["recall"]) == EARLIER["recall"]


@pytest.mark.parametrize(
    ("model", "run"),
    [
        ("passkey-linear", "passkey"),
        ("passkey-delta", "passkey"),
        ("needles-linear", "needles"),
        ("needles-gated", "needles_gated_64"),
    ],
)
def test_a_shipped_checkpoint_is_of_its_config(model, run):
    """Their configs and identities are of the version that trained them."""
    index = json.loads((MODELS / model / "index.json").read_text())
    tokenizer = [f"data.synthetic.tokenizer={MODELS / model / 'tokenizer.model'}"] * run.startswith("needles")
    update = ["model.attention.update=delta"] * (model == "passkey-delta")
    config = load_run(run, [*tokenizer, *update])
    source = open_source(config)
    check_resumable(index["config"], to_tree(config))
    check_same_data(source.upgrade_identity(index["state"]["data"]), source.identity, source.name)
    assert validate(index["config"]).data.synthetic.kind == run.split("_")[0]
    other = open_source(load_run(run, [*tokenizer, *update, "data.synthetic.pressure=3"]))
    with pytest.raises(ConfigError, match="is not the data that the checkpoint was trained on"):
        check_same_data(other.upgrade_identity(index["state"]["data"]), other.identity, other.name)


@pytest.mark.parametrize("kind", CHANGES)
def test_every_field_counts_and_defaults_are_left_out(kind):
    base, changes = kind(), CHANGES[kind]
    assert set(changes) == {field.name for field in dataclasses.fields(kind)} - {"kind", "tokenizer"}
    configs = [base, *(dataclasses.replace(base, **{name: value}) for name, value in changes.items())]
    assert (identify_1(base, BYTE) is None) == (kind is BabilongConfig), "it came after version 1"
    assert len({identify(config, BYTE) for config in configs}) == len(configs)
    if kind is not BabilongConfig:
        later = LATER_NEEDLES if kind is NeedlesConfig else {}
        known = [base, *(config for name, config in zip(changes, configs[1:], strict=True) if name not in later)]
        assert len({identify_1(config, BYTE) for config in known}) == len(known)
        assert {identify_1(dataclasses.replace(base, **{name: later[name]}), BYTE) for name in later} <= {None}
    assert json.loads(identify(base, BYTE))["fields"] == {}
    for (name, value), config in zip(changes.items(), configs[1:], strict=True):
        assert json.loads(identify(config, BYTE))["fields"] == {name: list(value) if name == "tasks" else value}


def test_a_field_that_comes_later_leaves_identities_as_they_are():
    later = dataclasses.make_dataclass(
        "Later", [("flavour", str, "plain")], bases=(PasskeyConfig,), frozen=True, kw_only=True
    )
    assert identify(later(digits=6), BYTE) == identify(PasskeyConfig(digits=6), BYTE)
    assert identify_1(later(digits=6), BYTE) == identify_1(PasskeyConfig(digits=6), BYTE)
    assert identify(later(digits=6, flavour="other"), BYTE) != identify(later(digits=6), BYTE)
    assert identify_1(later(digits=6, flavour="other"), BYTE) is None
