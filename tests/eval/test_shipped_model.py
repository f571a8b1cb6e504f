"""The trained models that come with the repository do what their cards say, at a length that takes seconds."""

from pathlib import Path

import pytest

from infini_train.data.passkey import PasskeyWriter
from infini_train.data.passkey_wordings import find_wording
from infini_train.eval.loading import open_trained
from infini_train.eval.passkey import answer_grid
from infini_train.eval.passkey_scores import PasskeyGrid
from infini_train.eval.scores import Score

MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODELS.glob("*/index.json")))
@pytest.mark.parametrize("wording", ["paper", "kitchen"])
def test_a_shipped_model_recalls_a_key_from_far_behind_its_training_length(name, wording):
    trained = open_trained(MODELS / name)
    window = trained.config.train.window_tokens
    grid = PasskeyGrid(lengths_tokens=(4 * window,), positions=(0.0, 0.5, 1.0), samples=4, seed=11, wording=wording)
    writer = PasskeyWriter(trained.tokenizer, find_wording(wording), grid.digits)
    answers = [
        a for batch in answer_grid(trained.model, writer, grid, trained.tokenizer.bos_id, lanes=12) for a in batch
    ]
    assert Score.of(answers).exact >= 11, [(a.position, a.key, a.said) for a in answers if not a.is_exact]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODELS.glob("*/index.json")))
def test_a_shipped_model_is_small_and_has_a_card(name):
    files = [path for path in (MODELS / name).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert f"infini-train eval passkey models/{name}" in card
