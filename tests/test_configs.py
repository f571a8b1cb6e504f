"""Every shipped config loads, and every model counts to its name."""

import re
from pathlib import Path

import pytest

from infini_train.config.attention import InfiniConfig
from infini_train.config.files import dump, load_model, load_run, override, read_tree, validate
from infini_train.config.model import ModelConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
RUNS = sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml"))
UNIT = {"m": 10**6, "b": 10**9}


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
    tree = override(read_tree(CONFIGS / "run" / f"{name}.yaml"), settings)
    assert validate(tree).model.attention.kind in attention


@pytest.mark.parametrize("name", sorted(set(RUNS) - {"debug"}))
def test_the_gates_can_travel(name: str) -> None:
    """A gate moves at most its learning rate a step, and has to travel about 4; cosine leaves about 0.55 of the sum."""
    config = load_run(name)
    assert config.optim.gate_lr * config.train.total_steps * 0.55 >= 4
