"""The generated parts of docs/results.md against the files that they come from."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def passkey() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "benchmarks" / "passkey.py"))


def test_the_passkey_tables_are_those_of_the_files(passkey):
    page, found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), passkey["load"]()
    assert found and passkey["fill_page"](page, found) == page, "run python benchmarks/passkey.py"
    assert page.count("\n| passkey") >= len(found)


def test_kept_files_name_no_machine():
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        assert "/tmp" not in text and "/home" not in text
