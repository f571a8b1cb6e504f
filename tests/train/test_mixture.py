"""A run over a mixture: logged as it is read, resumed exactly, refused when it can't last, ended by too much damage."""

import dataclasses
import json

import pytest

from infini_train.config.errors import ConfigError
from infini_train.data.shards import Dataset
from infini_train.logs import console
from infini_train.train.checkpointing import save_session
from infini_train.train.loop import train
from infini_train.train.opening import open_session


@pytest.fixture
def mixture(tmp_path, configure, tools):
    """Two datasets, 3 to 1, short documents first."""
    folders = [tools.write_shards(tmp_path / name, lengths, seed) for seed, (name, lengths) in enumerate(SETS.items())]

    def build(*settings, run="run", weights=(3, 1)):
        parts = ", ".join(f"{{folder: {folder}, weight: {w}}}" for folder, w in zip(folders, weights, strict=True))
        return configure(
            "data.train=null",
            f"data.mixture=[{parts}]",
            "data.curriculum=[{tokens: 200, max_document_tokens: 30}]",
            *settings,
            run=run,
        )

    return build


SETS = {"stories": (5, 13, 40, 100, 3, 61, 22, 9, 150), "code": (31, 17, 48, 12, 90, 70)}


def test_the_mix_that_was_read_is_logged(mixture, tmp_path):
    config = mixture("train.max_steps=12", "log.every_steps=4")
    train(config)
    rows = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss/train" in row][-1]
    shares = {name: last[f"mix/{tmp_path / name}/share"] for name in SETS}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["stories"] == pytest.approx(0.75, abs=0.05)
    assert last[f"mix/{tmp_path / 'stories'}/epochs"] > 1


def test_a_mixture_goes_on_exactly(mixture, tools):
    whole = open_session(mixture(run="whole"))
    steps = tools.drive(whole, 6)
    first = open_session(mixture(run="cut"))
    tools.drive(first, 3)
    save_session(first)
    first.saver.wait()
    again = open_session(mixture(run="cut"))
    assert [step.loss for step in tools.drive(again, 3)] == [step.loss for step in steps[3:]]
    tools.assert_same(tools.capture(again), tools.capture(whole))
    with pytest.raises(ConfigError, match=r"data.curriculum: is \[\] here and .*, and a resumed run can't change it"):
        open_session(mixture("data.curriculum=[]", run="cut"))
    with pytest.raises(ConfigError, match=r"data.train: .* \(tokenizer, shards or mixture differ\)"):
        open_session(mixture(run="cut", weights=(1, 1)))


def test_epochs_that_end_before_the_run_are_refused(mixture, tmp_path):
    parts = ", ".join(f"{{folder: {tmp_path / name}, epochs: 2}}" for name in SETS)
    with pytest.raises(
        ConfigError, match=r"data.mixture: with these epochs there are [\d,]+ tokens, and the run reads"
    ):
        open_session(mixture(f"data.mixture=[{parts}]", "train.max_steps=1000"))


def test_too_many_damaged_documents_end_the_run(mixture, tmp_path, capsys):
    config = mixture("data.max_corrupt_documents=2", "train.max_steps=50", "log.every_steps=1")
    dataset = Dataset.open(tmp_path / "code")
    shard = tmp_path / "code" / dataset.manifest.shards[0].file
    shard.write_bytes(bytes(shard.stat().st_size))
    with (
        pytest.raises(
            ConfigError, match=r"data.max_corrupt_documents: [3-6] damaged documents were met, and the limit is 2"
        ),
        console(),
    ):
        train(config)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert 3 <= len(warnings) <= 6 and all("/code: the data of document" in line for line in warnings)


def test_text_that_ends_too_early_is_saved_and_told(mixture, tmp_path):
    """A rollback continues after the text it leaves out, so epochs can end before the run."""
    parts = ", ".join(f"{{folder: {tmp_path / name}, epochs: 1}}" for name in SETS)
    config = mixture(f"data.mixture=[{parts}]", "train.max_steps=5", "train.window_tokens=16", "data.curriculum=[]")
    session = open_session(config)
    for _ in range(8):  # windows left out
        _, session.lanes = session.reader.next(session.lanes)
    save_session(session)
    session.saver.wait()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=9))
    with pytest.raises(ConfigError, match=r"data.mixture: the text ended at step \d of 9; raise the epochs"):
        train(longer)
    stopped = open_session(longer)
    assert 0 < stopped.step < 9, "what was learned is saved"
