"""The trained models that come with the repository do what their cards say, at a length that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infini_train.eval.passkey import PasskeyGrid, PasskeyPrompts
from infini_train.eval.retrieval import RetrievalScore, answer_prompts
from infini_train.inference.loading import open_trained

MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODELS.glob("passkey-*/index.json")))
@pytest.mark.parametrize("wording", ["paper", "kitchen"])
def test_a_shipped_model_recalls_a_key_from_far_beyond_its_training_length(name, wording):
    trained = open_trained(MODELS / name)
    window = trained.config.train.window_tokens
    grid = PasskeyGrid(lengths_tokens=(4 * window,), depths=(0.0, 0.5, 1.0), samples=4, seed=11, wording=wording)
    prompts = PasskeyPrompts(grid, trained.tokenizer, trained.step_tokens)
    answers = [answer for batch in answer_prompts(trained.model, prompts, lanes=12) for answer in batch]
    assert RetrievalScore.of(answers).exact >= 11, [(a.position, a.key, a.said) for a in answers if not a.is_exact]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODELS.glob("*/index.json")))
def test_a_shipped_model_is_small_and_has_a_card(name):
    files = [path for path in (MODELS / name).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert any(
        f"infini-train eval {test} models/{name}" in card for test in ("passkey", "needles", "summarise", "babilong")
    )


@pytest.mark.parametrize(
    ("model", "length", "least"), [("needles-linear", "1K", {1: 12, 4: 7}), ("needles-gated", "4K", {4: 11, 16: 9})]
)
def test_a_shipped_model_tells_keys_apart(model, length, least, tmp_path):
    """In texts longer than those of its training; a guess among four keys would be right 3 times in 12."""
    test = [sys.executable, "-m", "infini_train.cli", "eval", "needles", str(MODELS / model)]
    test += ["--task", "multikey", "--digits", "2", "--haystack", "varied", "--needles", *map(str, least)]
    options = ["--lengths", length, "--samples", "12", "--lanes", "12", "--depths", "0.5", "--seed", "11"]
    subprocess.run([*test, *options, "--out", str(tmp_path / "found")], check=True, capture_output=True, timeout=120)
    cells = json.loads((tmp_path / "found" / "results.json").read_text(encoding="utf-8"))["cells"]
    right = {cell["needles"]: cell["exact"] for cell in cells}
    assert all(right[count] >= number for count, number in least.items()), right


def test_the_shipped_model_knows_where_people_are(tmp_path):
    """In texts four times as long as those of its training; the same answer every time would be right in 2 of 12."""
    test = [sys.executable, "-m", "infini_train.cli", "eval", "babilong", str(MODELS / "babilong")]
    options = ["--lengths", "4K", "--samples", "12", "--lanes", "12", "--seed", "11", "--out", str(tmp_path / "found")]
    right = {}
    for without in ("", "memory"):
        changes = ["--without", without, "--overwrite"] if without else []
        subprocess.run([*test, *options, *changes], check=True, capture_output=True, timeout=120)
        right[without] = json.loads((tmp_path / "found" / "results.json").read_text(encoding="utf-8"))["all"]["exact"]
    assert right[""] >= 11 and right["memory"] <= 7, right


def test_the_shipped_summariser_tells_the_facts_of_a_story(tmp_path):
    """Eight stories of 300 words, as good as all of them longer than the model's layers see without memory."""
    made = [sys.executable, str(MODELS.parent / "benchmarks" / "stories.py"), "--out", str(tmp_path)]
    subprocess.run([*made, "--count", "8", "--words", "300", "--name", "test", "--seed", "5"], check=True, timeout=60)
    stories = tmp_path / "test.jsonl"
    test = [sys.executable, "-m", "infini_train.cli", "eval", "summarise", str(MODELS / "stories")]
    options = ["--data", str(stories), "--temperature", "0", "--max-new-tokens", "40", "--out", str(tmp_path / "found")]
    subprocess.run([*test, *options], check=True, capture_output=True, timeout=120)
    wanted = [json.loads(line)["summary"] for line in stories.read_text(encoding="utf-8").splitlines()]
    lines = (tmp_path / "found" / "summaries.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    said = {line["number"]: line["said"].strip() for line in map(json.loads, lines)}
    assert sum(said[number] == summary for number, summary in enumerate(wanted)) >= 7


MISTAKES = {
    "perplexity": ("--data", "nowhere"),
    "passkey": (),
    "needles": (),
    "context": ("--data", "nowhere"),
    "summarise": ("--data", "nowhere"),
    "harness": ("--tasks", "nothing"),
    "gates": (),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_an_evaluation_says_nothing_but_its_own_words(kind, tmp_path):
    """Notices of libraries, which appear when they are imported in the wrong order, have no place on the screen."""
    model = MODELS / "passkey-linear" if MISTAKES[kind] else tmp_path / "nothing"
    command = [sys.executable, "-m", "infini_train.cli", "eval", kind, str(model), *MISTAKES[kind]]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 2 and said.stdout == ""
    assert said.stderr.startswith("error: ") and said.stderr.count("\n") == 1, said.stderr
