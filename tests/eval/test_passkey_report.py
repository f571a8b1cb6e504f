"""A passkey test from the command line to its files: what is written, that it goes on, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.cli import main
from infini_train.config.errors import ConfigError
from infini_train.data.shards import ShardWriter
from infini_train.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from infini_train.eval import passkey_report
from infini_train.eval.loading import open_trained
from infini_train.eval.passkey_report import AnswerFile, evaluate_passkey, find_home
from infini_train.eval.passkey_scores import Answer, PasskeyGrid
from infini_train.parallel import device

SETTINGS = {"wording": "paper", "seed": 0}
SMALL = ("--lengths", "260", "300", "--positions", "3", "--samples", "2", "--lanes", "6")


def call(*arguments: object) -> int:
    """The exit code of a command."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return 0 if stop.code is None else int(stop.code)
    return 0


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step over bytes."""
    home = tmp_path_factory.mktemp("home")
    with ShardWriter(home / "train", ByteTokenizer()) as writer:
        writer.add(ByteTokenizer().encode("The grass is green. " * 20), n_bytes=400, id="document")
    shape = {"vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48, "init_std": 0.3}
    tree = {
        "run_dir": str(home / "run"),
        "model": {**shape, "attention": {"kind": "infini", "segment_tokens": 16}},
        "data": {"train": str(home / "train"), "validation": str(home / "train")},
        "train": {"window_tokens": 32, "batch_lanes": 2, "max_steps": 1},
        "optim": {"warmup_steps": 0, "gate_lr": 3.0},
    }
    (home / "tiny.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "MATMUL_PROBE_SIZE", 64)
        assert call("train", home / "tiny.yaml") == 0
    return home / "run"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_table_lines_picture_and_scalars(run, capsys):
    capsys.readouterr()
    assert call("eval", "passkey", run, *SMALL) == 0
    said = capsys.readouterr().out
    assert said.count(" exact 0/2 = 0 (0-65.8)") == 6, "each cell when it is done"
    assert re.search(r"^exact match +260 +300$", said, flags=re.MULTILINE) and "all: exact 0/12, 0 (0-24.2)" in said
    folder = run / "eval" / "passkey-1"
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "heatmap.png", "results.json"]
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"] and results["step"] == 1 and len(results["cells"]) == 6
    board = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    assert board.Tags()["images"] == ["eval/passkey/exact match by length and position"]
    assert {tag for tag in board.Tags()["scalars"] if "match" in tag} == {
        f"eval/passkey/exact match/{length} at {position}" for length in (260, 300) for position in ("0", "0.5", "1")
    }
    assert board.Scalars("eval/passkey/digits/300 at 1")[0].step == 1


def test_json_is_one_line_and_other_tests_have_other_folders(run, capsys):
    capsys.readouterr()
    assert call("eval", "passkey", run, *SMALL, "--samples", 1, "--wording", "harbour", "--seed", 3, "--json") == 0
    said = capsys.readouterr()
    results = json.loads(said.out)
    assert said.out.count("\n") == 1 and " exact 0/1 " in said.err
    assert results["folder"] == str(run / "eval" / "passkey-1-harbour-seed3") and results["all"]["samples"] == 6
    assert call("eval", "passkey", run, *SMALL, "--samples", 1, "--out", run / "mine", "--json") == 0
    assert {path.name for path in (run / "mine").iterdir()} == {
        "answers.jsonl",
        "heatmap.png",
        "results.json",
        "tensorboard",
    }


def test_more_samples_and_lengths_add_to_what_is_there(run, capsys):
    assert call("eval", "passkey", run, *SMALL) == 0
    file = run / "eval" / "passkey-1" / "answers.jsonl"
    before = file.read_text()
    more = ("--lengths", 300, 280, "--positions", 0, 1, "--samples", 3)
    assert call("eval", "passkey", run, *more) == 0
    assert "4 of 12 answers were there already" in capsys.readouterr().out
    after = file.read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 8
    assert call("eval", "passkey", run, *more, "--out", run / "fresh") == 0
    answers = [AnswerFile(path, {}).answers for path in (file, run / "fresh" / "answers.jsonl")]
    first, fresh = ({a.prompt: (a.key, a.said, a.key_token) for a in found} for found in answers)
    assert fresh.items() <= first.items() and len(fresh) == 12


def test_perplexity_may_be_left_out(run, capsys):
    found = []
    for command in (["eval"], ["eval", "perplexity"]):
        for words in ([run, "--max-tokens", 64, "--json"], ["--json", "--max-tokens", 64, run]):
            capsys.readouterr()
            assert call(*command, *words) == 0
            found.append(json.loads(capsys.readouterr().out)["loss"])
    assert len(found) == 4 and len(set(found)) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--wording", "papr"], "--wording: papr: no such wording; choose one of paper, "),
        (["--lengths", "32KB"], "--lengths: 32KB is no length"),
        (["--lengths", "100"], "--lengths: 100 tokens can't hold the prompt; wording paper with 5 digits takes 250 "),
        (
            ["--lengths", "260", "--digits", "10"],
            "--lengths: 260 tokens can't hold the prompt; wording paper with ",
        ),
        (["--positions", "0.5", "2"], "--positions: give at least one, each between 0 (start) and 1 (end)"),
        (["--samples", "0"], "--samples: must be positive"),
        (["--out", __file__], f"--out: {__file__} is a file; name a folder"),
    ],
)
def test_mistakes_get_one_line(arguments, line, run, capsys):
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    assert call("eval", "passkey", run, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_a_run_without_a_checkpoint(tmp_path, capsys):
    assert call("eval", "passkey", tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: holds no checkpoint")


def test_a_tokenizer_that_joins_digits(run, tmp_path):
    """Refused before anything is written."""
    with (tmp_path / "t.model").open("wb") as file:
        text = "The pass key is 12345 67 890 12 34 56 78 90 123 what was read? " * 20
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text]), model_writer=file, vocab_size=80, hard_vocab_limit=False, minloglevel=2
        )
    trained = open_trained(run)._replace(tokenizer=SentencePieceTokenizer(tmp_path / "t.model"))
    grid = PasskeyGrid(lengths_tokens=(400,), positions=(0.5,), samples=1)
    with pytest.raises(ConfigError, match=r"^tokenizer: doesn't write each digit as a token of its own"):
        evaluate_passkey(trained, grid, lanes=1)
    assert not (run / "eval").exists()


# --------------------------------------------------------------------------------------------------------- interrupted


def test_a_stopped_test_goes_on(run, monkeypatch):
    """Stopped while a batch is read: the batches before it are kept, and the end is that of a test never stopped."""
    trained, grid = open_trained(run), PasskeyGrid(lengths_tokens=(260, 400), positions=(0.0, 1.0), samples=3)
    batches = passkey_report.answer_grid

    def stop_in_the_third(*arguments, **options):
        for number, answers in enumerate(batches(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield answers

    with monkeypatch.context() as patch:
        patch.setattr(passkey_report, "answer_grid", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            evaluate_passkey(trained, grid, lanes=2, say=lambda line: None)
    folder = run / "eval" / "passkey-1"
    assert [path.name for path in folder.iterdir()] == ["answers.jsonl"]
    said: list[str] = []
    stopped = evaluate_passkey(trained, grid, lanes=2, say=said.append)
    assert said[0] == "4 of 12 answers were there already"
    whole = evaluate_passkey(trained, grid, lanes=2, out=run / "whole", say=lambda line: None)
    assert stopped["cells"] == whole["cells"] and stopped["key_phases"] == whole["key_phases"]


@pytest.mark.parametrize(
    ("checkpoint", "home"),
    [("runs/a/checkpoints/step-00000001", "runs/a"), ("models/passkey", "models/passkey")],
)
def test_results_go_to_the_run_or_to_a_checkpoint_of_its_own(checkpoint, home, tmp_path):
    assert find_home(tmp_path / checkpoint) == tmp_path / home


# ---------------------------------------------------------------------------------------------------------- the answers


def answers_of(samples: int) -> list[Answer]:
    places = {"length_tokens": 300, "position": 0.1, "tokens": 290, "key_token": 17, "question_token": 250}
    measured = {"start_tokens_per_s": None, "end_tokens_per_s": 90.5, "lanes": 2, "peak_memory_bytes": 2**20}
    return [Answer(**places, **measured, sample=sample, key="123", said="12?") for sample in range(samples)]


def test_answers_come_back_from_disk(tmp_path):
    first, more = answers_of(4)[:3], answers_of(4)[3:]
    file = AnswerFile(tmp_path / "new" / "answers.jsonl", SETTINGS)
    assert file.answers == [] and not (tmp_path / "new").exists()
    file.append(first)
    AnswerFile(tmp_path / "new" / "answers.jsonl", SETTINGS).append(more)
    again = AnswerFile(tmp_path / "new" / "answers.jsonl", SETTINGS)
    assert again.answers == first + more
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("torn", [1, 40])
def test_a_torn_line_is_asked_again(torn, tmp_path):
    path, answers = tmp_path / "answers.jsonl", answers_of(3)
    AnswerFile(path, SETTINGS).append(answers)
    path.write_bytes(path.read_bytes()[:-torn])
    file = AnswerFile(path, SETTINGS)
    assert file.answers == answers[: 3 if torn == 1 else 2]  # only the line's end was lost
    file.append(answers_of(5)[len(file.answers) :])
    assert AnswerFile(path, SETTINGS).answers == answers_of(5)


def test_answers_of_another_test_are_not_mixed(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, SETTINGS).append(answers_of(2))
    with pytest.raises(ConfigError) as caught:
        AnswerFile(path, {**SETTINGS, "seed": 1})
    assert str(caught.value) == (
        f"--out: {tmp_path} holds another test (seed: 0, not 1); name another folder, or pass --overwrite"
    )
    file = AnswerFile(path, {**SETTINGS, "seed": 1}, overwrite=True)
    assert file.answers == [] and len(AnswerFile(path, SETTINGS).answers) == 2, "nothing is lost before there is more"
    file.append(answers_of(1))
    assert json.loads(path.read_text().splitlines()[0]) == {"settings": {**SETTINGS, "seed": 1}}
    path.write_text("something else\n")
    with pytest.raises(ConfigError, match="holds no answers of a passkey test"):
        AnswerFile(path, SETTINGS)
