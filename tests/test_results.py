"""The generated parts of docs/results.md against the files that they come from."""

import argparse
import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def beside() -> Iterator[None]:
    """Programs of benchmarks/ import each other, as when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def passkey() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "benchmarks" / "passkey.py"))


def test_the_passkey_tables_are_those_of_the_files(passkey):
    page, found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), passkey["load"]()
    assert found and passkey["fill_page"](page, found) == page, "run python benchmarks/passkey.py"
    assert page.count("\n| passkey") >= len(found)


@pytest.fixture(scope="module")
def table2() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "benchmarks" / "table2_report.py"))


def test_table_2_is_that_of_the_files(table2):
    page, found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), table2["load"]()
    assert table2["fill_page"](page, found) == page, "run python benchmarks/table2.py --report"


def test_the_rate_of_an_arm_is_chosen_by_the_validation_books(table2):
    """Not by the test books, and not by other sizes of the memory or other seeds."""

    def run(rate: str, validation: float, test: float, seed: int = 0, size: str = "") -> dict[str, object]:
        losses = {"validation": {"loss": validation}, "test": {"loss": test, "perplexity": 2.0}}
        more = {"memory_numbers": 10, "carried_bytes": 40, "train_tokens_per_cpu_s": None, "train_peak_rss_bytes": 1}
        return {"arm": "rmt", "size": size, "rate": rate, "seed": seed, "parameters": 3, **losses, **more}

    found = [run("1", 3.0, 1.0), run("2", 2.0, 4.0), run("1", 1.0, 0.5, seed=1), run("1", 1.0, 0.5, size="small")]
    found.append(run("2", 2.0, 5.0, seed=1))
    assert table2["best_rate"](found, "rmt") == "2"
    assert [each["test"]["loss"] for each in table2["chosen"](found, "rmt")] == [4.0, 5.0]
    row = table2["tabulate_arms"](found).splitlines()[-1]
    assert "| rmt | 2 |" in row and "4.5000, 4.0000 to 5.0000" in row
    page = table2["fill_page"](f"before\n{table2['BEGIN']}\n{table2['END']}\nafter\n", found)
    assert page.startswith("before\n") and page.endswith("\nafter\n") and row in page


def test_kept_files_name_no_machine():
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        assert "/tmp" not in text and "/home" not in text


def test_the_tables_of_harder_memory_are_those_of_the_files():
    needles = runpy.run_path(str(ROOT / "benchmarks" / "needles.py"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert needles["fill_page"](page) == page, "run python benchmarks/needles.py"
    assert page.count(" table -->\n\n| ") >= 2


def test_the_recall_table_is_that_of_the_files():
    recall = runpy.run_path(str(ROOT / "benchmarks" / "recall.py"))
    page, found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), recall["load"]()
    assert found and recall["fill_page"](page, found) == page, "run python benchmarks/recall.py --report"


@pytest.fixture(scope="module")
def context() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "benchmarks" / "context.py"))


def test_the_context_tables_are_those_of_the_files(context):
    page, found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), context["load"]()
    assert found and context["fill_page"](page, found) == page, "run python benchmarks/context.py"


def test_context_tests_of_other_books_or_targets_share_no_table(context, capsys):
    plan = dict.fromkeys(context["PLAN"], 1)
    parser = argparse.ArgumentParser()
    context["check_alike"]({"a": plan, "b": dict(plan)}, parser)
    with pytest.raises(SystemExit):
        context["check_alike"]({"a": plan, "b": {**plan, "targets": 2}}, parser)
    assert "b.json: other targets than a.json; test both alike, or remove one" in capsys.readouterr().err


def test_the_table_of_summaries_is_that_of_the_files():
    summaries = runpy.run_path(str(ROOT / "benchmarks" / "summaries.py"))
    page, found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), summaries["load"]()
    assert found and summaries["fill_page"](page, found) == page, "run python benchmarks/summaries.py"
    said = "Otto, a mason of Basel, set out in Easter with Emil and a dog and found the lost iron map."
    assert list(summaries["read_facts"](said).values()) == [
        "Otto",
        "mason",
        "Basel",
        "Easter",
        "Emil",
        "dog",
        "iron",
        "map",
    ]
    assert summaries["read_facts"](said.replace("lost ", "")) == {}
