"""Commands that read long texts say which layers keep all of it, or see one window alone."""

import json
import logging

import pytest

from infini_train.inference.growth import warn_of_growth, warn_of_windows

GROWS = (
    "warning: keys and values of the whole text stay in layer 1 of 2: 256 bytes a token and lane in {},"
    " 268.4 MB at 1M tokens\n"
)


@pytest.fixture(scope="module")
def mixed_run(train_one_step, tmp_path_factory):
    """A run of one step: its second layer attends to everything."""
    attention = {
        "kind": "mixed",
        "variants": {"memory": {"kind": "infini", "segment_tokens": 8}, "whole": {"kind": "full"}},
        "pattern": ["memory", "whole"],
    }
    return train_one_step(tmp_path_factory.mktemp("home"), 128, attention=attention)


def test_generation_names_the_layers_and_keeps_its_output_clean(call, mixed_run, capsys):
    capsys.readouterr()
    words = ("generate", mixed_run, "--prompt", "abc", "--max-new-tokens", 3, "--ignore-end", "--temperature", 0)
    assert call(*words) == 0
    said = capsys.readouterr()
    assert said.err == GROWS.format("fp32")
    assert said.out.startswith("abc") and "warning" not in said.out


def test_a_measurement_counts_in_its_precision(call, mixed_run, tmp_path, capsys):
    words = ("--lengths", 512, "--samples", 1, "--positions", 50, "--precision", "bf16", "--out", tmp_path, "--json")
    capsys.readouterr()
    assert call("eval", "passkey", mixed_run, *words) == 0
    said = capsys.readouterr()
    assert GROWS.format("bf16").replace("256", "128").replace("268.4", "134.2") in said.err
    assert json.loads(said.out)


def test_a_stream_of_windows_says_what_full_layers_do_not_see(call, mixed_run, capsys):
    """The loss is that of windows as long, memory and all, not that of the whole text."""

    def evaluate(*words) -> tuple[dict, str]:
        capsys.readouterr()
        assert call("eval", mixed_run, "--json", *words) == 0
        said = capsys.readouterr()
        return json.loads(said.out), said.err

    streamed, said = evaluate("--stream")
    assert said == (
        "warning: full attention (layer 1 of 2) is over the 32 tokens of one forward here, not over the text before;"
        " --window-tokens sets how many\n"
    )
    usual, said = evaluate()
    assert said == ""
    narrow, _ = evaluate("--window-tokens", 32)
    assert streamed["loss"] == pytest.approx(narrow["loss"], abs=1e-6) != usual["loss"]


@pytest.mark.parametrize("name", ["linear", "full", "rmt"])
def test_stacks_that_are_all_of_one_kind_need_no_warning(name, tiny, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_growth(tiny(name), "fp32")
        warn_of_windows(tiny("linear"), 64)
    assert caplog.text == ""
