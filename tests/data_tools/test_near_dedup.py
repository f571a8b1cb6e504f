"""Near duplicates by datatrove's blocks, in several tasks: what `clean --near-dedup` finds on one machine."""

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
pytest.importorskip("rensa")

from data_tools import cli, near_dedup, plan  # noqa: E402
from data_tools.clean import CleanOptions, clean_corpus  # noqa: E402
from data_tools.encode import encode_corpus  # noqa: E402
from data_tools.near_dedup import NearDedupOptions, SlurmOptions  # noqa: E402
from data_tools.readers import documents  # noqa: E402
from infini_train.config.errors import ConfigError  # noqa: E402

WORDS = ["".join(random.Random(i).choices("abcdefghij", k=2 + i % 6)) for i in range(500)]


def prose(seed: int, words: int = 120) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """40 texts of which 20 come again with another end, in another order; in several tasks."""
    monkeypatch.setattr(plan, "_MIN_TASK_BYTES", 10_000)
    texts = [" ".join(prose(i)) for i in range(40)] + [" ".join([*prose(i)[:-2], "other", "end"]) for i in range(20)]
    rows = [{"id": f"d{i}", "text": text, "title": f"T{i}"} for i, text in enumerate(texts)]
    random.Random(1).shuffle(rows)
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:30], '{"text": ""}', "{", *lines[30:]]) + "\n")
    return tmp_path / "c.jsonl"


def test_it_finds_what_one_machine_finds_and_encode_reads_it(corpus, tmp_path) -> None:
    options = NearDedupOptions(threshold=0.8, workers=2, on_bad_record="skip")
    report = near_dedup.near_dedup([str(corpus)], tmp_path / "many", options)
    one = clean_corpus([str(corpus)], tmp_path / "one", CleanOptions(near_dedup=0.8, on_bad_record="skip"))
    assert vars(report) == vars(one) and report.documents == 40
    assert report.left_out.documents == {"near duplicates": 20, "empty documents": 1, "bad records": 1}
    assert "c.jsonl:32" in report.left_out.places[0]
    found, expected = (list(documents([tmp_path / name])) for name in ("many", "one"))
    assert [d._replace(source="") for d in found] == [d._replace(source="") for d in expected]
    assert len(list((tmp_path / "many").glob("part-*"))) > 2
    written, _ = encode_corpus([str(tmp_path / "many")], "byte", tmp_path / "set")
    assert written[tmp_path / "set"].documents == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "many", "one", "set"]


def test_a_stopped_run_goes_on(corpus, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["near-dedup", str(corpus), "--out", str(tmp_path / "set"), "--workers", "1"]
    assert cli.main(arguments) == 2
    assert "c.jsonl:32: is not valid JSON" in capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / ".set.partial"
    done = len(list((folder / "logs" / "signatures" / "completions").iterdir()))
    assert done >= 1, "what was finished stays"
    corpus.write_text("".join(line + "\n" for line in corpus.read_text().splitlines() if line != "{"))
    assert cli.main(arguments) == 2
    assert "the sources have changed since" in capsys.readouterr().err
    assert cli.main([*arguments, "--restart"]) == 0
    assert "set: 40 documents" in capsys.readouterr().out and not folder.exists()


def test_refusals(corpus, tmp_path) -> None:
    with pytest.raises(ConfigError, match="part: datatrove divides the tasks"):
        NearDedupOptions(part="1/2")
    with pytest.raises(ConfigError, match="threshold: 2 is not a share"):
        near_dedup.near_dedup([str(corpus)], tmp_path / "out", NearDedupOptions(threshold=2))
    with pytest.raises(ConfigError, match="standard input and named pipes can't be read by several tasks"):
        near_dedup.near_dedup(["-"], tmp_path / "out", NearDedupOptions())
    for wrong in ({"partition": "cpu\n#SBATCH --x"}, {"partition": "cpu", "arguments": ("a=$(b)",)}):
        with pytest.raises(ConfigError, match="holds characters that no option of sbatch needs"):
            SlurmOptions(**wrong)
    with pytest.raises(ConfigError, match="arguments: 'exclusive' is not NAME=VALUE"):
        SlurmOptions(partition="cpu", arguments=("exclusive",))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl"]
