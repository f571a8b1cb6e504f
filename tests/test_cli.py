"""infini-train: what works, and that a mistake gets one clear line, exit code 2, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from infini_train.checkpoint.index import dump_index, parse_index
from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from infini_train.parallel import device

MODELS = Path(__file__).resolve().parent.parent / "models"


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_shards(folder: Path, tokenizer=None, seed: int = 0) -> Path:
    tokenizer = tokenizer or ByteTokenizer()
    random = np.random.default_rng(seed)
    with ShardWriter(folder, tokenizer) as writer:
        for number, length in enumerate((60, 90, 30, 120)):
            tokens = random.integers(97, 103, length) % (tokenizer.vocab_size - 4) + 4
            writer.add(tokens, n_bytes=length, id=f"document {number}")
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_tools.cli import main as infini_data

    folder = tmp_path_factory.mktemp("tokenizer")
    words = " ".join(f"word{number % 37} and thing{number % 11}" for number in range(3000))
    (folder / "text.txt").write_text(words)
    try:
        infini_data(
            ["tokenizer", str(folder / "text.txt"), "--vocab-size", "300", "--out", str(folder / "other.model")]
        )
    except SystemExit as stop:
        assert not stop.code
    return folder / "other.model"


@pytest.fixture(scope="module")
def home(call: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, its shards, and a run of two steps."""
    home = tmp_path_factory.mktemp("home")
    write_shards(home / "train")
    write_shards(home / "validation", seed=1)
    shape = {"vocab_size": 259, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48}
    tree = {
        "run_dir": str(home / "run"),
        "model": {**shape, "attention": {"kind": "infini", "segment_tokens": 8}},
        "data": {"train": str(home / "train"), "validation": str(home / "validation")},
        "train": {"window_tokens": 32, "batch_lanes": 2, "max_steps": 2},
        "optim": {"warmup_steps": 1, "gate_lr": 3.0},
    }
    (home / "tiny.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "MATMUL_PROBE_SIZE", 64)
        assert call("train", home / "tiny.yaml") == 0
    return home


@pytest.fixture
def refused(
    call: Callable[..., int], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Calls a command that must be refused; returns its one line. Neither `home` nor `tmp_path` may change."""

    def check(*arguments: object) -> str:
        capsys.readouterr()
        before = listing(home), listing(tmp_path)
        code = call(*arguments)
        said = capsys.readouterr().err
        assert code == 2, said
        assert said.startswith("error: ") and said.endswith("\n") and said.count("\n") == 1, said
        assert (listing(home), listing(tmp_path)) == before, "something was written"
        return said.removeprefix("error: ").removesuffix("\n")

    return check


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_an_unknown_config(refused):
    assert refused("train", "debgu") == "debgu: no run config of this name; did you mean debug?"
    assert refused("train", "nowhere/mine.yaml") == "nowhere/mine.yaml: no such file"


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("train.windw_tokens=64", "train.windw_tokens: unknown key; did you mean window_tokens?"),
        ("model.attention.segment_token=4", "model.attention.segment_token: unknown key; did you mean segment_tokens?"),
        ("model.attention.kind=infni", 'model.attention.kind: unknown value "infni"; did you mean infini?'),
        ("train.batch_lanes=two", 'train.batch_lanes: must be a valid integer, not "two"'),
        ("train", "--set train: write it as section.field=value"),
    ],
)
def test_a_typo_in_the_config(refused, home, assignment, line):
    assert refused("train", home / "tiny.yaml", "--set", assignment) == line


def test_a_window_that_segments_do_not_fill(refused, home):
    line = refused("train", home / "tiny.yaml", "--set", "train.window_tokens=20")
    assert line == "train.window_tokens: 20 is not a multiple of model.attention.segment_tokens (8); use 16 or 24"
    line = refused("eval", home / "run", "--window-tokens", 20)
    assert line == "--window-tokens: 20 is not a multiple of the model's segment of 8 tokens; use 16 or 24"
    assert refused("eval", home / "run", "--window-tokens", 3).endswith(" segment of 8 tokens; use 8")


def test_data_that_are_not_there(refused, home, tmp_path):
    new = ("--set", f"run_dir={tmp_path / 'new'}")
    line = refused("train", home / "tiny.yaml", *new, "--set", f"data.train={tmp_path / 'none'}")
    assert line == f"data.train: {tmp_path / 'none'}: no such dataset folder; write one with infini-data encode"
    (tmp_path / "empty").mkdir()
    line = refused("train", home / "tiny.yaml", *new, "--set", f"data.validation={tmp_path / 'empty'}")
    assert line.startswith(f"data.validation: {tmp_path / 'empty'}: holds no manifest.json")
    assert "no such dataset folder" in refused("eval", home / "run", "--data", tmp_path / "none")


def test_a_truncated_shard(refused, home, tmp_path):
    shutil.copytree(home / "train", tmp_path / "torn")
    (shard,) = (tmp_path / "torn").glob("*.tar")
    os.truncate(shard, shard.stat().st_size - 700)
    settings = ("--set", f"data.train={tmp_path / 'torn'}", "--set", f"run_dir={tmp_path / 'new'}")
    line = refused("train", home / "tiny.yaml", *settings)
    assert line.startswith(f"data.train: {shard}: has ") and "not the" in line
    assert str(shard) in refused("eval", home / "run", "--data", tmp_path / "torn")


def test_a_vocabulary_smaller_than_the_data(refused, home, tmp_path):
    settings = ("--set", "model.vocab_size=100", "--set", f"run_dir={tmp_path / 'new'}")
    line = refused("train", home / "tiny.yaml", *settings)
    assert line.startswith("model.vocab_size: 100 is smaller than the 259 token ids") and "model.vocab_size=259" in line


def test_data_of_another_tokenizer(refused, home, tmp_path, tokenizer_file):
    other = write_shards(tmp_path / "other", load_tokenizer(tokenizer_file))
    size = ("--set", "model.vocab_size=400", "--set", f"run_dir={tmp_path / 'new'}")
    line = refused("train", home / "tiny.yaml", *size, "--set", f"data.validation={other}")
    assert line.startswith(f"data.validation: {other} was encoded with another tokenizer than {home / 'train'}")
    line = refused("eval", home / "run", "--data", other)
    assert line.startswith(f"--data: {other} was encoded with another tokenizer than the model's")


def test_a_tokenizer_that_is_not_the_models(refused, home, tmp_path):
    shutil.copytree(home / "run", tmp_path / "run")
    (index,) = (tmp_path / "run" / "checkpoints").glob("*/index.json")
    parsed = parse_index(index.read_text(encoding="utf-8"))
    parsed.state["tokenizer"] = "0" * 64
    index.write_text(dump_index(parsed), encoding="utf-8")
    beside, own = index.with_name("tokenizer.model"), tmp_path / "run" / "tokenizer.model"
    other = SentencePieceTokenizer(MODELS / "stories" / "tokenizer.model").model_bytes
    for file, content, problem in (
        (own, None, "is missing; put the right one there"),
        (own, other, "is not the tokenizer the model was trained with"),
        (own, b"nonsense", "is not a SentencePiece model"),
        (beside, b"nonsense", "is not a SentencePiece model"),
    ):
        if content is not None:
            file.write_bytes(content)
        for command in ("eval", "generate"):
            line = refused(command, tmp_path / "run")
            assert line.startswith(str(file)) and problem in line


def test_a_folder_without_a_checkpoint(refused, home, tmp_path):
    (tmp_path / "empty").mkdir()
    for command in ("eval", "generate"):
        assert refused(command, tmp_path / "empty").startswith(f"{tmp_path / 'empty'}: holds no checkpoint")
        assert refused(command, tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such folder")
    settings = ("--set", f"run_dir={tmp_path / 'new'}", "--set", f"train.init_from={tmp_path / 'empty'}")
    assert "holds no checkpoint" in refused("train", home / "tiny.yaml", *settings)


def test_a_checkpoint_of_another_model(refused, home, tmp_path):
    settings = ("--set", f"run_dir={tmp_path / 'new'}", "--set", f"train.init_from={home / 'run'}")
    line = refused("train", home / "tiny.yaml", *settings, "--set", "model.num_layers=3")
    assert line.startswith("train.init_from: ") and "model.num_layers is 2 there and 3 here" in line
    line = refused("train", home / "tiny.yaml", "--set", "model.hidden_size=64", "--set", "train.max_steps=4")
    assert line.startswith("model.hidden_size: is 64 here and 32 in the checkpoint")


def test_a_torn_checkpoint(refused, home, tmp_path):
    shutil.copytree(home / "run", tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints").glob("step-*/rank-00000.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    for command in ("eval", "generate"):
        assert "rank-00000.safetensors is torn" in refused(command, tmp_path / "run")
    assert "is torn" in refused("train", home / "tiny.yaml", "--set", f"run_dir={tmp_path / 'run'}")


def test_a_run_dir_that_can_not_be_written(refused, home, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        line = refused("train", home / "tiny.yaml", "--set", f"run_dir={place}")
        assert line.startswith(f"run_dir: {place} can't be written: ")


def test_prompts_and_sampling(refused, home, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("Müller".encode("latin-1"))
    run = home / "run"
    assert refused("generate", run, "--prompt-file", tmp_path / "latin1.txt").endswith(
        "is not UTF-8 (byte 1); convert it"
    )
    assert "No such file" in refused("generate", run, "--prompt-file", tmp_path / "none.txt")
    assert refused("generate", run, "--memory", tmp_path / "none").endswith(
        "none can't be read: No such file or directory"
    )
    assert refused("generate", run, "--memory", tmp_path / "latin1.txt").startswith("--memory: ")
    assert refused("generate", run, "--max-new-tokens=-1").startswith("--max-new-tokens: must not be negative")
    assert refused("generate", run, "--top-p", 0).startswith("--top-p: ")
    assert refused("generate", run, "--temperature=-1").startswith("--temperature: ")
    assert refused("generate", run, "--temperature", "nan").startswith("--temperature: ")
    assert refused("generate", run, "--seed=-1").startswith("--seed: must lie between 0 and ")
    assert refused("generate", run, "--seed", 10**30).startswith("--seed: must lie between 0 and ")
    assert refused("generate", run, "--prompt", os.fsdecode(b"caf\xe9")) == (
        "--prompt: is not UTF-8 (byte 3); convert it"
    )


def test_a_memory_goes_on(home, call, capsys, tmp_path):
    """Read, asked, and asked again of the memory of both; an empty prompt has nothing to go on with."""
    run, settings = home / "run", ("--temperature", 0, "--max-new-tokens", 5, "--ignore-end", "--no-echo")
    assert call("generate", run, "--prompt", "The grass is green. The ", *settings) == 0
    whole = capsys.readouterr().out
    kept = ("--save-memory", tmp_path / "a.memory")
    assert call("generate", run, "--prompt", "The grass is green. ", "--no-echo", "--max-new-tokens", 0, *kept) == 0
    said = capsys.readouterr()
    assert said.out == "" and "a.memory: memory of 21 tokens, " in said.err
    for _ in range(2):
        assert call("generate", run, "--memory", tmp_path / "a.memory", "--prompt", "The ", *settings) == 0
        assert capsys.readouterr().out == whole
    assert call("generate", run, "--memory", tmp_path / "a.memory") == 2
    assert "--prompt: give a text that follows what --memory remembers" in capsys.readouterr().err


def test_a_demo_of_no_text(refused, tmp_path):
    line = refused("demo", "--text", tmp_path / "none", "--out", tmp_path / "out")
    assert line == f"--text: {tmp_path / 'none'}: no such file or folder"
    line = refused("demo", "--out", tmp_path / "out", "--set", "train.max_step=5")
    assert line == "train.max_step: unknown key; did you mean max_steps?"
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=["64k", "1300k", "1700k"])
def small_disk(request, tmp_path_factory) -> Iterator[Path]:
    """File systems too small for the run: seen before it starts, or when metrics or a checkpoint are written."""
    folder = tmp_path_factory.mktemp("disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_without_space(call, home, small_disk, capsys, monkeypatch):
    monkeypatch.setattr(device, "MATMUL_PROBE_SIZE", 64)
    capsys.readouterr()
    model = ("--set", "model.hidden_size=128", "--set", "model.ffn_size=256")
    code = call("train", home / "tiny.yaml", "--set", f"run_dir={small_disk / 'run'}", *model)
    said = capsys.readouterr().err
    assert code == 2, said
    assert (
        said.count("\n") == 1
        and said.startswith("error: ")
        and "No space left on device" in said.replace("no s", "No s")
    )
    assert not list(small_disk.rglob("*.tmp*")) and not list(small_disk.rglob("step-*")), "nothing half-written"


# -------------------------------------------------------------------------------------------------------- what works


def test_print_config_is_the_resolved_config(call, home, capsys):
    capsys.readouterr()
    assert call("train", home / "tiny.yaml", "--set", "optim.lr=1e-3", "--print-config") == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["optim"]["lr"] == 1e-3 and tree["optim"]["beta2"] == 0.95 and tree["train"]["max_steps"] == 2


def test_eval_prints_a_table_or_json(call, home, capsys):
    capsys.readouterr()
    assert call("eval", home / "run", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tokens"] == 304 and values["documents"] == 4
    assert 0 < values["unigram_entropy"] < values["loss"] < 10
    assert call("eval", home / "run", "--stream", "--data", home / "validation") == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table.keys() == values.keys() and table["tokens"] == "304"
    assert call("eval", home / "run" / "checkpoints" / "step-00000002", "--json", "--forget", "--window-tokens", 8) == 0
    forgotten = json.loads(capsys.readouterr().out)
    assert forgotten["loss"] != values["loss"] and forgotten["tokens"] == 304
    assert call("eval", home / "run", "--json", "--precision", "bf16") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(values["loss"], abs=0.05)


def test_eval_from_another_folder_finds_the_validation_data(call, home, tmp_path, monkeypatch, capsys, refused):
    """Trained with relative paths, evaluated by absolute path from elsewhere."""
    monkeypatch.setattr(device, "MATMUL_PROBE_SIZE", 64)
    write_shards(tmp_path / "there" / "held", seed=1)
    monkeypatch.chdir(tmp_path / "there")
    assert call("train", home / "tiny.yaml", "--set", "run_dir=runs/a", "--set", "data.validation=held") == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    capsys.readouterr()
    assert call("eval", tmp_path / "there" / "runs" / "a", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["data"] == str(tmp_path / "there" / "held") and values["tokens"] == 304
    (tmp_path / "there" / "held").rename(tmp_path / "there" / "gone")
    assert refused("eval", tmp_path / "there" / "runs" / "a") == (
        "data.validation: the run's validation data were not found (looked for held,"
        f" {tmp_path / 'there' / 'held'}); name a folder with --data"
    )


def test_generate_goes_on_from_a_prompt(call, home, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("abc def " * 20)
    capsys.readouterr()
    assert call("generate", home / "run", "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 9) == 0
    said = capsys.readouterr().out
    assert said.startswith("abc def " * 20) and said.endswith("\n")
    assert (
        call("generate", home / "run", "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 9, "--no-echo")
        == 0
    )
    assert capsys.readouterr().out == said.removeprefix("abc def " * 20)
    texts = []
    for _ in range(2):
        assert call("generate", home / "run", "--prompt", "abc", "--temperature", 0, "--ignore-end") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 50


def test_a_finished_run_says_so(call, home, capsys, monkeypatch):
    monkeypatch.setattr(device, "MATMUL_PROBE_SIZE", 64)
    capsys.readouterr()
    assert call("train", home / "tiny.yaml") == 0
    assert "the run has done all of its 2 steps; raise train.max_steps to go on" in capsys.readouterr().out


def test_a_run_resumes_from_a_resharded_checkpoint(call, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "MATMUL_PROBE_SIZE", 64)
    copy = tmp_path / "copy" / "checkpoints" / "step-00000002"
    assert call("checkpoint", "reshard", home / "run", copy) == 0
    assert call("train", home / "tiny.yaml", "--set", f"run_dir={tmp_path / 'copy'}", "--set", "train.max_steps=3") == 0
    assert f"resumed from {copy} (step 2)" in capsys.readouterr().out
    assert call("checkpoint", "verify", tmp_path / "copy") == 0
    assert capsys.readouterr().out.count(": OK\n") == 2
    assert call("checkpoint", "reshard", home / "run", tmp_path / "weights", "--weights-only") == 0
    new = ("--set", f"run_dir={tmp_path / 'new'}", "--set", f"train.init_from={tmp_path / 'weights'}")
    assert call("train", home / "tiny.yaml", *new) == 0
    assert f"new run with the weights of {tmp_path / 'weights'}" in capsys.readouterr().out
