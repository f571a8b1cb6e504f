"""A pipe's command and a signed URL may hold secrets: they are used, and not kept with what is made of the corpus."""

import io
import tarfile
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.plan import make_plan

SECRET = "SeCrEt01X"


@pytest.fixture
def source(tmp_path: Path) -> str:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3):
            member = tarfile.TarInfo(f"d{i}.txt")
            member.size = 9
            tar.addfile(member, io.BytesIO(b"some text"))
    return f"pipe:env HF_TOKEN={SECRET} cat {tmp_path / 'a.tar'}"


def kept(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("command", [["encode", "--tokenizer", "byte"], ["clean"]])
def test_the_result_holds_no_secret_of_its_source(command: list[str], source: str, tmp_path: Path) -> None:
    main([command[0], source, *command[1:], "--out", str(tmp_path / "out")])
    assert any((tmp_path / "out").iterdir()) and kept(tmp_path / "out") == []


def test_what_is_kept_while_it_is_made_is_for_its_owner_alone(source: str, tmp_path: Path) -> None:
    make_plan(tmp_path, [source], {}, 1_000_000)
    assert {path.name for path in tmp_path.glob("*.json*")} == {"command.json", "sources.jsonl", "tasks.jsonl"}
    assert SECRET not in (tmp_path / "command.json").read_text()
    for name in ("sources.jsonl", "tasks.jsonl"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    make_plan(tmp_path, [source], {}, 1_000_000)  # the same command resumes
