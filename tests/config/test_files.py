"""The one edge where a user's YAML becomes frozen dataclasses: what it accepts, and what it says when it doesn't."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infini_train.config.attention import FullConfig, InfiniConfig, LocalConfig
from infini_train.config.errors import ConfigError
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
from infini_train.config.run import RunConfig, divide_processes
from tests.config.conftest import BASE, write

RUNS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "run").glob("*.yaml"))


def test_defaults_are_filled_in(base: Path) -> None:
    config = load_run(str(base))
    assert config.model.kv_heads == 4
    assert config.model.key_dim == config.model.value_dim == 16
    assert config.micro_lanes == 4
    assert config.train.tokens_per_step == 512
    assert config.directory == Path("runs/run")


WRONG = {
    "unknown section": ("optimizer.lr=1", "optimizer: unknown key; did you mean optim?"),
    "unknown field": ("train.max_step=3", "train.max_step: unknown key; did you mean max_steps?"),
    "unknown field of a variant": (
        "model.attention.segment_token=8",
        "model.attention.segment_token: unknown key; did you mean segment_tokens?",
    ),
    "unknown field like no other": (
        "data.zzz=3",
        "data.zzz: unknown key; known: train, mixture, curriculum, synthetic",
    ),
    "a section named like a variant": ("local=3", "local: unknown key; known: model, data"),
    "unknown variant": ("model.attention={kind: infin}", 'model.attention.kind: unknown value "infin"; did you mean'),
    "variant without its kind": ("model.attention=null", "model.attention"),
    "a list for a variant": ("model.attention={kind: [full]}", "model.attention.kind: unknown value"),
    "no variant": ("model.attention={kind: null}", "model.attention.kind: unknown value null; known: infini"),
    "text for a number": ("train.batch_lanes=four", 'train.batch_lanes: must be a valid integer, not "four"'),
    "quoted number": ("train.batch_lanes='4'", 'train.batch_lanes: must be a valid integer, not "4"'),
    "fraction for a count": ("train.batch_lanes=1.5", "train.batch_lanes: must be a valid integer"),
    "truth for a number": ("train.batch_lanes=true", "train.batch_lanes: must be a valid integer, not true"),
    "number for text": ("name=3", "name: must be a valid string, not 3"),
    "not a number": ("optim.lr=.nan", "optim.lr: must be a finite number"),
    "infinite": ("model.rope_theta=.inf", "model.rope_theta: must be a finite number"),
    "bad literal": ("train.precision=fp16", "train.precision: must be 'fp32' or 'bf16', not \"fp16\""),
    "value for a section": ("model=3", "model: must be a mapping, not 3"),
    "nothing for a section": ("train=", "train: must be a mapping, not null"),
    "missing field": ("train={window_tokens: null}", "train.window_tokens: must be a valid integer, not null"),
    "both budgets": (
        "train.max_tokens=100",
        "train.max_steps: give exactly one of train.max_steps and train.max_tokens",
    ),
    "window off the grid": (
        "train.window_tokens=100",
        "train.window_tokens: 100 is not a multiple of model.attention.segment_tokens (32); use 96 or 128",
    ),
    "a length off the window": (
        "train.segment_tokens=[32, 48]",
        "train.segment_tokens: 48 does not divide train.window_tokens (128); use divisors of 128",
    ),
    "a length of nothing": ("train.segment_tokens=[32, 0]", "train.segment_tokens: 0: each length must be positive"),
    "more than all steps": ("train.local_dropout=1.5", "train.local_dropout: must lie between 0 and 1"),
    "no steps to fall in": ("train.local_dropout_steps=0", "train.local_dropout_steps: must be positive"),
    "window below a segment": ("eval.window_tokens=8", "eval.window_tokens: 8 is not a multiple"),
    "heads that don't divide": ("model.num_heads=3", "model.num_heads: 3 heads don't divide hidden_size 64"),
    "kv heads that don't divide": ("model.num_kv_heads=3", "model.num_kv_heads: 3 key-value heads can't share 4"),
    "odd head": ("model.head_dim=7", "model.head_dim: rotary embedding needs an even size, not 7"),
    "lanes that don't divide": (
        "train.micro_batch_lanes=3",
        "train.micro_batch_lanes: 4 lanes can't be cut",
    ),
    "validation without data": ("eval.every_steps=5", "data.validation: is needed because eval.every_steps is set"),
    "endless warm-up": ("optim.warmup_steps=20", "optim.warmup_steps: 20 warm-up steps don't fit into a run of 20"),
    "endless decay": (
        "optim={schedule: wsd, decay_steps: 16}",
        "optim.decay_steps: 16 steps after 5 of warm-up don't fit",
    ),
    "decay of a cosine": ("optim.decay_steps=5", "optim.decay_steps: is used by schedule: wsd only"),
    "overlap beyond a segment": (
        "model.attention.overlap_tokens=33",
        "model.attention.overlap_tokens: must lie between",
    ),
    "convolution beyond a segment": (
        "model.attention.conv_tokens=33",
        "model.attention.conv_tokens: must lie between",
    ),
    "a convolution's spread": ("model.attention.conv_std=-1", "model.attention.conv_std: must be at least 0, or null"),
    "text twice": ("data.mixture=[{folder: a}]", "data.train: give a folder of shards to train on (or data.mixture"),
    "a pipe": (
        "data.train='pipe:cat x.tar'",
        "data.train: a pipe can't be shuffled or resumed; give a folder, or a URL",
    ),
    "a weight of nothing": (
        "data={train: null, mixture: [{folder: a, weight: 0}]}",
        "data.mixture.weight: must be positive; leave out what is not to be read",
    ),
    "a part's field": (
        "data={train: null, mixture: [{folder: a, wieght: 1}]}",
        "data.mixture.0.wieght: unknown key; did",
    ),
    "a field of an optional section": (
        "data={train: null, synthetic: {kind: passkey, digit: 4}}",
        "data.synthetic.digit: unknown key; did you mean digits?",
    ),
    "a field of an optional section inside a section": (
        "model.rope_scaling={factor: 4, original_token: 8}",
        "model.rope_scaling.original_token: unknown key; did you mean original_tokens?",
    ),
    "no threshold": (
        "data={train: null, synthetic: {kind: passkey, few_digits_below_loss: 0}}",
        "data.synthetic.few_digits_below_loss: must be positive, or null for never",
    ),
    "negative": ("train.max_steps=-1", "train.max_steps: must be positive"),
    "zero": ("checkpoint.keep_last=0", "checkpoint.keep_last: must be at least 1"),
    "negative skips": ("guard.max_skips=-1", "guard.max_skips: must not be negative"),
    "a list for a kind": ("model.attention.kind=[local]", 'model.attention.kind: unknown value ["local"]'),
    "a mapping for a kind": ("data={train: null, synthetic: {kind: {}}}", "data.synthetic.kind: unknown value {}"),
    "more than a float holds": ("model.attention.gate_init=1e300", "model.attention.gate_init: must be less than"),
    "more seconds than a clock counts": ("parallel.timeout_s=1e39", "parallel.timeout_s: must be less than or equal"),
    "a width that no machine holds": ("model.hidden_size=100000", "model.hidden_size: must be less than or equal to"),
    "more than 64 bits": ("seed=100000000000000000000000", "seed: a number of more than 64 bits"),
    "more layers than any model": ("model.num_layers=1000000", "model.num_layers: must be less than or equal to 1000"),
    "an epsilon that fp32 has not": (
        "optim.eps=1e-50",
        "optim.eps: must be greater than or equal to 1e-38, not 1e-50",
    ),
    "a path of nothing": ("run_dir=''", "run_dir: must not be empty"),
    "a long path": (f"run_dir={'x/' * 3000}", "run_dir: is too long: a name has at most 255 bytes, a path 4095"),
    "a name that is too long": (f"data.train={'x' * 300}", "data.train: is too long: a name has at most 255 bytes"),
    "a name of another folder": ("name=../x", "name: must be able to name a folder"),
    "a name of two lines": ('name="a\\nb"', "name: must be able to name a folder"),
    "an absolute name": ("name=/x", "name: must be able to name a folder"),
    "a deep path": (f"{'.'.join('a' * 1500)}=1", "--set a.a.a"),
    "negative seed": ("seed=-1", "seed: must lie between"),
}


@pytest.mark.parametrize(("assignment", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_gets_one_line_that_names_its_field(base: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(str(base), [assignment])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_micro_batches_are_counted_where_the_ranks_are_known(base: Path) -> None:
    config = load_run(str(base), ["train={batch_lanes: 65536, micro_batch_lanes: 1}"])
    assert divide_processes(config, 16).lanes_per_rank == 4096
    message = r"^train\.micro_batch_lanes: 8192 micro-batches in a step are more than 4096; raise it"
    with pytest.raises(ConfigError, match=message):
        divide_processes(config, 8)


def test_a_checkpoint_keeps_the_name_it_has(base: Path) -> None:
    """Names that are refused today could be given before."""
    tree = to_tree(load_run(str(base)))
    assert validate({**tree, "name": "/scratch/run"}).directory == Path("/scratch/run")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train\.batch_lanes: is missing"):
        load_run(write(tmp_path / "a.yaml", BASE.replace("batch_lanes: 4, ", "")))


@pytest.mark.parametrize(
    ("text", "number"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), ("1.5e3", 1500.0), ("1e3", 1000.0), (".5e-3", 5e-4), ("1.", 1.0), ("2", 2.0)],
)
def test_numbers_are_read_as_people_mean_them(base: Path, text: str, number: float) -> None:
    assert load_run(str(base), [f"optim.lr={text}"]).optim.lr == number


@pytest.mark.parametrize("text", ["2026-01-31", "2026-99-99", "12:00:00", "1:30", "e3", "1e", "3e-4x"])
def test_what_only_looks_like_a_number_stays_text(base: Path, text: str) -> None:
    assert load_run(str(base), [f"name={text}"]).name == text


def test_an_include_is_overridden_by_later_ones_and_by_the_file(tmp_path: Path) -> None:
    write(tmp_path / "first.yaml", "seed: 1\nname: first\noptim: {lr: 1e-3, eps: 1e-6}\n")
    write(tmp_path / "second.yaml", "name: second\noptim: {lr: 2e-3}\n")
    tree = read_tree(Path(write(tmp_path / "own.yaml", "include: [first.yaml, second.yaml]\noptim: {beta1: 0.8}\n")))
    assert tree == {"seed": 1, "name": "second", "optim": {"lr": 2e-3, "eps": 1e-6, "beta1": 0.8}}


def test_a_scale_counts_where_its_file_is_included(tmp_path: Path) -> None:
    write(tmp_path / "first.yaml", "seed: 1\nname: first\nscales: {8: {seed: 8, name: eight}, 16: {seed: 16}}\n")
    own = Path(write(tmp_path / "own.yaml", "include: [first.yaml]\nname: own\nscales: {8: {optim: {lr: 1e-3}}}\n"))
    assert read_tree(own) == read_tree(own, 4) == {"seed": 1, "name": "own"}
    assert read_tree(own, 8) == {"seed": 8, "name": "own", "optim": {"lr": 1e-3}}
    assert read_tree(own, 16) == {"seed": 16, "name": "own"}
    assert scale_sizes(str(own)) == [8, 16]


def test_a_setting_wins_over_a_scale(base: Path) -> None:
    base.write_text(BASE + "scales: {4: {parallel: {data_size: 4}, seed: 4}}\n")
    config = load_run(str(base), ["seed=5"], 4)
    assert (config.parallel.data_size, config.seed) == (4, 5)
    assert load_run(str(base)).parallel.data_size is None


def test_scales_are_no_field_of_a_run(base: Path) -> None:
    with pytest.raises(ConfigError, match="^scales: unknown key"):
        load_run(str(base), ["scales={}"])


def test_an_include_is_found_beside_the_file_before_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = Path(write(tmp_path / "own.yaml", "include: [model/demo.yaml]\n"))
    assert read_tree(path)["model"]["hidden_size"] > 1
    write(tmp_path / "model/demo.yaml", "model: {hidden_size: 1}\n")
    assert read_tree(path)["model"]["hidden_size"] == 1


def test_another_kind_replaces_the_variant_whole(base: Path) -> None:
    assert load_run(str(base), ["model.attention={kind: full}"]).model.attention == FullConfig()
    assert load_run(str(base), ["model.attention.kind=full"]).model.attention == FullConfig()
    local = load_run(str(base), ["model.attention={kind: local, segment_tokens: 64}"]).model.attention
    assert local == LocalConfig(segment_tokens=64)


def test_the_same_kind_keeps_its_other_fields(base: Path) -> None:
    attention = load_run(str(base), ["model.attention={kind: infini, update: delta}"]).model.attention
    assert attention == InfiniConfig(segment_tokens=32, update="delta")


def test_overrides_apply_in_order_and_leave_the_tree_alone(base: Path) -> None:
    tree = read_tree(base)
    before = repr(tree)
    assert override(tree, ["seed=1", "optim.lr=1", "seed=2"])["seed"] == 2
    assert repr(tree) == before


@pytest.mark.parametrize(
    "assignment", ["seed", "=3", "a..b=3", ".a=3", "a.=3", "seed=[", "seed={a: 1, a: 2}", "seed=!!int ''"]
)
def test_a_malformed_override_is_quoted(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({}, [assignment])
    assert str(caught.value).startswith(f"--set {assignment}: ")


def test_a_name_close_to_a_shipped_one_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^dmo: no run config of this name; did you mean demo?"):
        resolve("dmo")
    with pytest.raises(ConfigError, match="^zzz: no model config of this name; known: .*125m"):
        resolve("zzz", "model")
    with pytest.raises(ConfigError, match="no such file"):
        resolve(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("debgu", "debgu: no run config of this name; did you mean debug?"),
        ("debgu.yaml", "debgu.yaml: no such file; did you mean debug?"),
        ("mine", "mine: no run config of this name; did you mean mine.yaml?"),
        ("own/tiny", "own/tiny: no run config of this name; did you mean own/tiny.yaml?"),
        ("own/tniy.yaml", "own/tniy.yaml: no such file; did you mean own/tiny.yaml?"),
        ("own/zzz.yaml", "own/zzz.yaml: no such file"),
        ("none/tiny.yaml", "none/tiny.yaml: no such file"),
        ("zzz", f"zzz: no run config of this name; known: {', '.join(RUNS)}"),
    ],
)
def test_a_config_that_is_not_there_gets_the_nearest(tmp_path, monkeypatch, name: str, hint: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    for file in ("mine.yaml", "own/tiny.yaml", "own/other.yaml"):
        write(tmp_path / file, BASE)
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    assert str(caught.value) == hint


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model/dmeo.yaml", "; did you mean model/demo.yaml?"),
        ("models/demo.yaml", "; did you mean model/demo.yaml?"),
        ("model/demo", "; did you mean model/demo.yaml?"),
        ("bsae.yaml", "; did you mean base.yaml?"),
        ("zzz.yaml", ""),
    ],
)
def test_an_include_that_is_not_there_gets_the_nearest(base: Path, name: str, hint: str) -> None:
    path = write(base.with_name("own.yaml"), f"include: [{name}]\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value) == f"{path}: include {name}: no such file beside it or below configs/{hint}"


@pytest.mark.parametrize("attention", ["full", "null", "{kind: full, segment_tokens: 3}", "{segment_tokens: 8}"])
def test_a_wrong_model_config_is_named(tmp_path: Path, attention: str) -> None:
    text = "model: {vocab_size: 9, hidden_size: 8, num_layers: 1, num_heads: 1, ffn_size: 8, attention: %s}\n"
    with pytest.raises(ConfigError, match=r"^model\.attention"):
        load_model(write(tmp_path / "m.yaml", text % attention))


def test_a_model_config_loads_without_a_run(tmp_path: Path) -> None:
    text = "model: {vocab_size: 9, hidden_size: 8, num_layers: 1, num_heads: 1, ffn_size: 8, attention: {kind: full}}\n"
    assert load_model(write(tmp_path / "m.yaml", text)).attention == FullConfig()
    assert load_model("demo") == load_run("demo").model


def leaves(value: Any) -> list[Any]:
    """Every dataclass inside this one, itself included."""
    inner = [getattr(value, f.name) for f in dataclasses.fields(value)]
    return [value] + [leaf for v in inner if dataclasses.is_dataclass(v) for leaf in leaves(v)]


def test_everything_is_frozen(base: Path) -> None:
    config = load_run(str(base))
    sections = leaves(config)
    assert len(sections) == 11
    for section in sections:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, 1)
    assert hash(config) == hash(load_run(str(base)))


def is_folder_name(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and all(part.strip() for part in parts) and not {".", ".."} & set(parts)


@given(
    name=st.one_of(
        st.text(min_size=1, max_size=50).filter(is_folder_name),
        st.sampled_from(["3e-4", "1e5", "null", "no", "2026-01-31", "~", "0x1f", ".5e3", "1_0e2"]),
    ),
    lr=st.floats(min_value=1e-30, max_value=1e6),
    steps=st.lists(st.integers(min_value=0, max_value=10**9)),
    attention=st.sampled_from(["{kind: full}", "{kind: local, segment_tokens: 16}", "{kind: infini, update: delta}"]),
)
def test_dump_and_load_give_the_same_config(
    tmp_path_factory: Any, name: str, lr: float, steps: Any, attention: str
) -> None:
    base = validate(override(read_tree_of(BASE, tmp_path_factory), [f"model.attention={attention}"]))
    config = dataclasses.replace(
        base,
        name=name,
        optim=dataclasses.replace(base.optim, lr=lr),
        log=dataclasses.replace(base.log, profile_steps=tuple(steps)),
    )
    assert validate(read_tree_of(dump(config), tmp_path_factory)) == config
    assert validate(to_tree(config)) == config


def read_tree_of(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    path.write_text(text, encoding="utf-8")
    return read_tree(path)


def test_a_budget_in_tokens_rounds_up(base: Path) -> None:
    config = load_run(str(base), ["train.max_steps=null", "train.max_tokens=10_241"])
    assert isinstance(config, RunConfig)
    assert config.train.total_steps == 21


def test_configs_are_read_without_torch() -> None:
    """Login nodes render jobs, and CI checks YAML, where no torch is installed."""
    code = (
        "import sys; from infini_train.config.files import load_run; load_run('demo'); "
        "heavy = {'torch', 'deepspeed', 'megatron', 'numpy'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
