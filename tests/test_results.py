"""The generated parts of the pages in docs/results/ against the kept results that they come from."""

import argparse
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "results"
PROGRAMS = (
    *("passkey", "needles", "summaries", "table2_report", "context", "recall", "capacity", "streaming"),
    *("plan_report", "context_parallel", "data", "faults_report", "stability", "babilong", "loss", "gpu_report"),
    "performance_report",
)
MARK = re.compile(r"^<!-- (.+): written by (benchmarks/\w+\.py) -->$", flags=re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def beside() -> Iterator[None]:
    """Programs of benchmarks/ import each other, as when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def programs() -> dict[str, dict[str, Any]]:
    return {name: runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py")) for name in PROGRAMS}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_tables_are_those_of_the_files(programs, name):
    page = programs[name]["PAGE"]
    text = page.path.read_text(encoding="utf-8")
    assert page.render() == text, f"run python {page.program}, with --report if it has that"
    assert text.count("\n| ") >= 2 * (len(page.blocks) - text.count("\nNot run yet.\n"))


@pytest.mark.parametrize(
    "name",
    [
        *sorted({*PROGRAMS} - {"plan_report", "gpu_report", "performance_report"}),
        *("table2", "plan", "key_books", "needle_texts", "tar_writers", "gpu_check", "performance"),
    ],
)
def test_help_writes_nothing(name, monkeypatch, capsys):
    def fail(*_):
        raise AssertionError(f"{name} --help writes")

    monkeypatch.setattr("page.ResultPage.write", fail)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


def test_every_block_has_its_program(programs):
    written = {(page.name, block) for page in (each["PAGE"] for each in programs.values()) for block in page.blocks}
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    assert {(path.stem, block) for path, text in pages.items() for block, _ in MARK.findall(text)} == written
    assert all((ROOT / program).is_file() for text in pages.values() for _, program in MARK.findall(text))


def test_a_block_is_replaced_and_nothing_else(programs):
    from page import fill_between

    assert fill_between("before\n<b>\nold\n<e>\nafter\n", "<b>", "<e>", "new") == "before\n<b>\n\nnew\n\n<e>\nafter\n"
    with pytest.raises(AssertionError, match="needs <b> and <e> once"):
        fill_between("before\n<b>\nafter\n", "<b>", "<e>", "new")


def test_every_kept_passkey_test_is_in_one_row(programs):
    passkey = programs["passkey"]
    found = passkey["load"]()
    tables = [passkey["tabulate_tests"](found, convolution) for convolution in (True, False)]
    rows = [row.split(" | ") for table in tables for row in table.splitlines()[2:]]
    assert sum(int(row[0].removeprefix("| ")) for row in rows) == len(found)
    exact = sum(length["exact"] for kept in found for length in kept["test"]["lengths"])
    assert sum(int(row[-1].split("/")[0].replace(",", "")) for row in rows) == exact


def test_every_kept_needle_test_is_in_the_table(programs):
    table = programs["needles"]["tabulate"]()
    tests = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results" / "needles").glob("*.json")]
    asked = sum(cell["samples"] for test in tests for cell in test["cells"])
    assert sum(int(samples) for samples in re.findall(r"\d+/(\d+): ", table)) == asked


def test_the_rate_of_an_arm_is_chosen_by_the_validation_books(programs):
    """Not by the test books, and not by other sizes of the memory or other seeds."""
    table2 = programs["table2_report"]

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


def test_kept_files_name_no_machine():
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        assert "/tmp" not in text and "/home" not in text


def test_context_tests_of_other_books_or_targets_share_no_table(programs, capsys):
    context = programs["context"]
    plan = dict.fromkeys(context["PLAN"], 1)
    parser = argparse.ArgumentParser()
    context["check_alike"]({"a": plan, "b": dict(plan)}, parser)
    with pytest.raises(SystemExit):
        context["check_alike"]({"a": plan, "b": {**plan, "targets": 2}}, parser)
    assert "b.json: other targets than a.json; test both alike, or remove one" in capsys.readouterr().err


def test_facts_are_read_off_a_summary(programs):
    summaries = programs["summaries"]
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


def test_the_front_page_fits_and_leads_to_every_page():
    front = (PAGES / "README.md").read_text(encoding="utf-8")
    assert len(front.splitlines()) < 100
    assert {path.name for path in PAGES.glob("*.md")} - {"README.md"} == set(re.findall(r"\]\(([\w-]+\.md)\)", front))


def test_headline_numbers_are_those_of_the_files(programs):
    """Front page and planner page; other numbers in prose are up to whoever changes a result."""
    front = (PAGES / "README.md").read_text(encoding="utf-8")
    errors = json.loads((ROOT / "benchmarks" / "results" / "plan" / "errors.json").read_text(encoding="utf-8"))
    memory, time = re.findall(r"largest ([\d.]+)%", programs["plan_report"]["summary"](errors))[:2]
    published = max(abs(run["predicted"] / run["published"] - 1) for run in errors["published"])
    assert f"memory within {memory} %, time within {time} %" in front
    assert f"off by up to {published:.1%}".replace("%", " %") in front
    plan = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert f"within {memory} % and step time within {time} %" in plan.replace("\n", " ")
    found = [kept for kept in programs["passkey"]["load"]() if kept["run"].get("conv_tokens")]
    paper = [length for kept in found if kept["test"]["wording"] == "paper" for length in kept["test"]["lengths"]]
    for name, lengths in (("up to 128K", range(2**17 + 1)), ("at 512K and 1M", range(2**18, 2**20 + 1))):
        exact, asked = (sum(x[key] for x in paper if x["length_tokens"] in lengths) for key in ("exact", "samples"))
        assert f"{exact:,} of {asked:,}" in front and name in front
