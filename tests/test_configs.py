"""Every shipped config loads, at all its scales and under its old names; every model counts to its name."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infini_train.config.attention import InfiniConfig
from infini_train.config.files import (
    dump,
    load_model,
    load_run,
    override,
    read_tree,
    resolve,
    scale_sizes,
    to_tree,
    validate,
)
from infini_train.config.model import ModelConfig
from infini_train.config.renamed import RENAMED, current_words
from infini_train.config.run import divide_processes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
RUNS = sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml"))
UNIT = {"m": 10**6, "b": 10**9}
# (run, processes) -> what differs there from the run on 8; each was a file of its own, named 1b_4nodes and so on.
SCALES = {
    ("1b", 32): {"parallel.data_size": 16},
    ("1b", 128): {"parallel.data_size": 64, "train.batch_lanes": 64},
    ("1b", 512): {"parallel.data_size": 128, "parallel.context_size": 4, "train.batch_lanes": 128},
    ("3b", 32): {"parallel.data_size": 8},
    ("3b", 128): {"parallel.data_size": 32, "train.batch_lanes": 64},
    ("3b", 512): {"parallel.data_size": 128, "train.batch_lanes": 128},
    ("8b", 32): {"parallel.data_size": 4},
    ("8b", 128): {"parallel.data_size": 16, "train.batch_lanes": 64},
    ("8b", 512): {"parallel.data_size": 64, "train.batch_lanes": 128},
}


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the decoder in closed form, term by term."""
    width, heads, kv_heads, key, value = (
        model.hidden_size,
        model.num_heads,
        model.kv_heads,
        model.key_dim,
        model.value_dim,
    )
    qkv = width * (heads * key + kv_heads * key + kv_heads * value)
    qkv_bias = (heads * key + kv_heads * key + kv_heads * value) * model.qkv_bias
    qk_norm = 2 * key * model.qk_norm
    gates = heads if isinstance(model.attention, InfiniConfig) else 0
    attention = qkv + qkv_bias + qk_norm + gates + heads * value * width
    layer = attention + 3 * width * model.ffn_size + 2 * width
    embeddings = model.vocab_size * width * (1 if model.tied_embeddings else 2)
    return embeddings + model.num_layers * layer + width


def test_the_promised_configs_are_there() -> None:
    assert {"demo", "debug", "125m", "350m", "1b", "3b", "8b"} <= set(MODELS)
    assert {"demo", "debug", "125m"} <= set(RUNS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_counts_to_its_name(name: str) -> None:
    model = load_model(name)
    size = re.fullmatch(r"(\d+)([mb])", name)
    if size:
        promised = int(size[1]) * UNIT[size[2]]
        assert count_parameters(model) == pytest.approx(promised, rel=0.05)
    else:
        assert count_parameters(model) < 3e6, "demo and debug are for two CPU cores"


def test_8b_is_llama_plus_gates() -> None:
    model = load_model("8b")
    assert count_parameters(model) - model.num_layers * model.num_heads == 8_030_261_248  # Llama 3.1 8B


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_holds_the_model_only(name: str) -> None:
    assert set(read_tree(CONFIGS / "model" / f"{name}.yaml")) == {"model"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loads_by_name_and_by_path(name: str) -> None:
    config = load_run(name)
    assert load_run(str(CONFIGS / "run" / f"{name}.yaml")) == config
    assert config.name == name
    assert dump(config)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("attention", ["{kind: full}", "{kind: local, segment_tokens: 32}"])
def test_a_run_can_switch_its_attention(name: str, attention: str) -> None:
    settings = [f"model.attention={attention}", "parallel.context_size=1"]  # full has no segments to divide
    settings += ["train.write_cost=0"]  # nor does any of these choose what to write
    tree = override(read_tree(CONFIGS / "run" / f"{name}.yaml"), settings)
    assert validate(tree).model.attention.kind in attention


@pytest.mark.parametrize("name", sorted(set(RUNS) - {"debug"}))
def test_the_gates_can_travel(name: str) -> None:
    """A gate moves at most its learning rate a step, and has to travel about 4; cosine leaves about 0.55 of the sum."""
    config = load_run(name)
    assert config.optim.gate_lr * config.train.total_steps * 0.55 >= 4


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Dotted path -> value."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_the_scales_are_those_of_the_table() -> None:
    assert {(name, size) for name in ("1b", "3b", "8b") for size in scale_sizes(name)} == set(SCALES)


@pytest.mark.parametrize(("name", "world_size"), SCALES)
def test_a_scale_changes_its_fields_and_no_others(name: str, world_size: int) -> None:
    base, scaled = load_run(name), load_run(name, (), world_size)
    expected = {**SCALES[name, world_size], "name": f"{name}_{world_size // 8}nodes"}
    assert flatten(to_tree(scaled)) == flatten(to_tree(base)) | expected
    assert divide_processes(scaled, world_size) == scaled, "it fits as many processes as it is for"
    assert validate(to_tree(scaled)) == scaled


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("form", ["name", "path", "include"])
def test_an_old_name_gives_the_config_that_it_gave(old: str, form: str, tmp_path: Path) -> None:
    including = tmp_path / "own.yaml"
    including.write_text(f"include: [run/{old}.yaml]\n")
    given = {"name": old, "path": str(CONFIGS / "run" / f"{old}.yaml"), "include": str(including)}[form]
    new = RENAMED[old]
    assert load_run(given) == load_run(new.name, [f"name={old}"], new.world_size)
    assert scale_sizes(given) == []
    assert resolve(old) == CONFIGS / "run" / f"{new.name}.yaml"


@pytest.mark.parametrize("old", RENAMED)
def test_the_words_for_an_old_name_give_the_same(old: str) -> None:
    command = [sys.executable, "-m", "infini_train.cli", "train", "--print-config"]
    now, before = (
        subprocess.run([*command, *words], capture_output=True, text=True, check=True)
        for words in (current_words(old), [old])
    )
    assert now.stdout == before.stdout and now.stderr == ""
    (note,) = before.stderr.splitlines()
    assert note.startswith(f"{old} is an old name; write {RENAMED[old].name}")


def test_the_older_passkey_recipe_is_what_its_name_says() -> None:
    """Fields in which passkey_linear and passkey_delta differed from passkey while they were files of their own."""
    new, linear, delta = (load_run(name) for name in ("passkey", "passkey_no_conv", "passkey_no_conv_delta"))
    differs = {
        "name": "passkey_no_conv",
        "model.attention.conv_tokens": 0,
        "data.synthetic.varied_wording": False,
        "train.max_steps": 8000,
        "optim.decay_steps": 2500,
    }
    assert flatten(to_tree(linear)) == flatten(to_tree(new)) | differs
    assert dataclasses.replace(delta.model.attention, update="linear") == linear.model.attention
    assert flatten(to_tree(delta)) == flatten(to_tree(linear)) | {
        "name": "passkey_no_conv_delta",
        "model.attention.update": "delta",
    }


def test_a_config_that_includes_another_has_its_scales_and_overrides_them() -> None:
    assert scale_sizes("continue_8b") == [32, 128, 512]
    config = load_run("continue_8b", (), 128)
    assert (config.name, config.parallel.data_size) == ("continue_8b", 16)
    assert config.train.batch_lanes == 32, "its own line comes after what it includes"
