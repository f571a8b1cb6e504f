"""Old spellings load as before; who wrote one reads a line that says what to write now."""

from pathlib import Path

import pytest

from infini_train.config.data import NeedlesConfig, PasskeyConfig, RecallConfig
from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, to_tree, validate
from infini_train.config.yaml_text import dump_tree

REST = """
model: {vocab_size: 1300, hidden_size: 64, num_layers: 2, num_heads: 4, ffn_size: 160}
train: {window_tokens: 512, batch_lanes: 4, max_steps: 20}
optim: {warmup_steps: 5}
"""
OLD = {
    "passkey": ("{digits: 6, pressure: 2}", PasskeyConfig(digits=6, pressure=2.0)),
    "needles": ("{tasks: [single], digits: 2}", NeedlesConfig(tasks=("single",), digits=2)),
    "recall": ("{joined: false}", RecallConfig(joined=False)),
}


def write(path: Path, data: str) -> str:
    path.write_text(f"{REST}\ndata: {data}\n")
    return str(path)


@pytest.mark.parametrize("kind", OLD)
def test_a_file_of_before_loads_and_says_what_to_write(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields, expected = OLD[kind]
    path = write(tmp_path / "mine.yaml", f"{{{kind}: {fields}}}")
    assert load_run(path).data.synthetic == expected
    (note,) = caplog.messages
    assert note == f"{path}: data.{kind} is deprecated; write data.synthetic with kind: {kind} and the same fields"


@pytest.mark.parametrize(
    ("assignment", "note"),
    [
        ("data.passkey.digits=7", "write data.synthetic.digits=7, where data.synthetic.kind is passkey"),
        ("data.passkey={digits: 7}", "write data.synthetic={kind: passkey, ...}"),
        ("data={passkey: {digits: 7}}", "write data.synthetic with kind: passkey and the same fields"),
    ],
)
def test_an_override_of_before_applies_and_says_what_to_write(
    assignment: str, note: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "mine.yaml", "{synthetic: {kind: passkey, pressure: 2}}")
    assert load_run(path, [assignment]).data.synthetic == PasskeyConfig(digits=7, pressure=2.0)
    assert caplog.messages == [f"--set {assignment}: data.passkey is deprecated; {note}"]


def test_a_file_of_before_changes_one_that_it_includes(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "{synthetic: {kind: passkey, digits: 6}}")
    path = tmp_path / "mine.yaml"
    path.write_text("include: [base.yaml]\ndata: {passkey: {pressure: 4}}\n")
    assert load_run(str(path)).data.synthetic == PasskeyConfig(digits=6, pressure=4.0)


def test_old_sections_take_nothing_over_from_texts_of_another_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "{synthetic: {kind: passkey, digits: 6, min_segments: 9}}")
    sets = ["data={passkey: null, needles: {questions: 2}}"]
    assert load_run(path, sets).data.synthetic == NeedlesConfig(questions=2)


def test_null_clears_the_section_that_it_names(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "{synthetic: {kind: passkey}}")
    assert load_run(path, ["data.passkey=null", "data.train=shards"]).data.synthetic is None
    assert load_run(path, ["data.recall=null"]).data.synthetic == PasskeyConfig()


@pytest.mark.parametrize("kind", OLD)
def test_what_was_saved_before_loads_in_silence(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint's config, and the config.yaml of a run on shards: it names all three sections."""
    config = load_run(write(tmp_path / "mine.yaml", f"{{synthetic: {{kind: {kind}}}}}"))
    tree = to_tree(config)
    section = tree["data"].pop("synthetic")
    del section["kind"]
    tree["data"] |= {**dict.fromkeys(OLD), kind: section}
    assert validate(tree) == config
    tree["data"] |= {kind: None, "train": "shards"}
    (tmp_path / "config.yaml").write_text(dump_tree(tree))
    assert load_run(str(tmp_path / "config.yaml")).data.synthetic is None
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{passkey: {}, recall: {}}", "data.passkey and data.recall: give only one of them, as data.synthetic"),
        ("{passkey: {}, synthetic: {kind: recall}}", "data.passkey and data.synthetic: give only one of them"),
        ("{passkey: {digit: 3}}", "data.synthetic.digit: unknown key; did you mean digits?"),
        ("{passkey: 3}", "data.synthetic: must be a mapping, not 3"),
        ("{synthetic: {digits: 3}}", "data.synthetic.kind: is missing; give one of passkey, needles, recall"),
        ("{synthetic: {kind: pass}}", 'data.synthetic.kind: unknown value "pass"; did you mean passkey?'),
    ],
)
def test_a_mistake_is_named(data: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write(tmp_path / "mine.yaml", data))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_of_several_ranks_of_srun_only_the_first_says_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for rank, name in ((1, "second.yaml"), (0, "first.yaml")):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        load_run(write(tmp_path / name, "{recall: {joined: false}}"))
    assert [message.partition(":")[0] for message in caplog.messages] == [str(tmp_path / "first.yaml")]
