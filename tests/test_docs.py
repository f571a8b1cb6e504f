"""The documentation against the code: marked commands run, and every path, option and config field named in it exists.

A shell block with ``<!-- run -->`` on the line above it is run. The blocks of one page run in order in one temporary
folder, each in a bash of its own. In a ``console`` block every line after ``$`` is run and must print exactly the
lines below it.
"""

import argparse
import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, get_args, get_origin, get_type_hints

import pytest

from data_tools.options import build_parser as build_data_parser
from infini_train import cli
from infini_train.checkpoint.compat import resumable_fields, same_weight_fields
from infini_train.config.attention import KINDS
from infini_train.config.data import SYNTHETIC_KINDS, SyntheticConfig
from infini_train.config.files import load_run
from infini_train.config.run import RunConfig
from infini_train.config.variant import AttentionVariant
from infini_train.train.optim import gate_warning
from launch.cli import build_parser as build_launch_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PAGE_NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
SHELLS = ("sh", "bash", "shell", "console")
TIMEOUT_S = 240

# Paths that begin like this are of this repository; a name with one of the suffixes may also be relative to a room.
TOP = ("infini_train/", "data_tools/", "configs/", "docs/", "tests/", "benchmarks/", ".ci/")
BASES = (ROOT, ROOT / "infini_train", ROOT / "configs")
SUFFIXES = (".py", ".yaml", ".md", ".toml")
WRITTEN = {"config.yaml"}  # by a run, into its own folder


class Block(NamedTuple):
    """A fenced block: its language, whether it is marked to run, its first line's number, its text."""

    language: str
    marked: bool
    line: int
    text: str


def split_page(text: str) -> tuple[str, list[Block]]:
    """The page's prose, and its fenced blocks."""
    prose: list[str] = []
    blocks: list[Block] = []
    body: list[str] | None = None
    previous, language, marked, first = "", "", False, 0
    for number, line in enumerate(text.splitlines(), 1):
        if body is None and (fence := re.fullmatch(r"```(\w*)", line.strip())):
            language, marked, first, body = fence[1], previous.strip() == "<!-- run -->", number + 1, []
        elif body is None:
            prose.append(line)
        elif line.strip() == "```":
            blocks.append(Block(language, marked, first, "\n".join(body)))
            body = None
        else:
            body.append(line)
        previous = line
    assert body is None, f"the block that begins on line {first} is never closed"
    return "\n".join(prose), blocks


def read_page(name: str) -> tuple[str, list[Block]]:
    return split_page((ROOT / name).read_text(encoding="utf-8"))


def inline_code(prose: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose)


# ------------------------------------------------------------------------------------------------------------- running


def runs_of(block: Block) -> Iterator[tuple[str, str | None]]:
    """Scripts of a block, each with what it must print (None: anything, but it must succeed)."""
    if block.language != "console":
        yield block.text, None
        return
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output.strip()


RUNNABLE = [name for name in PAGE_NAMES if any(block.marked for block in read_page(name)[1])]


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_marked_commands_run(name: str, tmp_path: Path) -> None:
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": scripts, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    (tmp_path / "models").symlink_to(ROOT / "models")  # as where this repository was cloned
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")  # code of exported models
    for block in read_page(name)[1]:
        if not block.marked:
            continue
        assert block.language in SHELLS, f"{name}:{block.line}: only shell blocks can be run"
        for script, expected in runs_of(block):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            if expected is None:
                assert done.returncode == 0, f"{name}:{block.line}: exit code {done.returncode}\n{done.stdout}"
            else:
                assert done.stdout.strip() == expected, f"{name}:{block.line}: {script}"
                assert done.returncode == (2 if expected.startswith("error: ") else 0)


# -------------------------------------------------------------------------------------------------------------- paths


def missing_paths(codes: list[str], page: Path) -> list[str]:
    """Inline code that looks like a file of this repository but is none."""
    missing = []
    for code in codes:
        path = code.split(":")[0]
        if not re.fullmatch(r"[\w./*-]+", path) or path in WRITTEN or path.startswith(("runs/", "data/")):
            continue
        if path.startswith(TOP):
            bases: tuple[Path, ...] = (ROOT,)
        elif path.endswith(SUFFIXES) and not path.startswith("."):
            bases = (*BASES, page.parent)
        else:
            continue
        if not any(any(base.glob(path.rstrip("/"))) for base in bases):
            missing.append(code)
    return missing


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_named_files_exist(name: str) -> None:
    assert missing_paths(inline_code(read_page(name)[0]), ROOT / name) == []


def test_a_missing_file_is_found() -> None:
    codes = ["infini_train/nowhere.py", "train/loop.py", "ops/nowhere.py", "model/demo.yaml", "loss/train"]
    assert missing_paths(codes, ROOT / "README.md") == ["infini_train/nowhere.py", "ops/nowhere.py"]


def test_the_picture_of_the_architecture_names_files_that_exist() -> None:
    """Redraw it with: python docs/generate_architecture.py."""
    figure = runpy.run_path(str(ROOT / "docs" / "generate_architecture.py"))["draw"]()
    named = {path for text in figure.axes[0].texts for path in re.findall(r"[\w/]+\.py", text.get_text())}
    assert "ops/memory.py" in named and missing_paths(sorted(named), ROOT / "docs" / "architecture.md") == []


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", split_page(text)[0], flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_resolve(name: str) -> None:
    for target in re.findall(r"(?:\]\(|<img src=\")([^)\s\"]+)", read_page(name)[0]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), f"{name}: {target}"


# ------------------------------------------------------------------------------------------------- options and fields


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def with_subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for each in subparsers(parser).values():
        yield from with_subparsers(each)


PARSERS = {"infini-train": cli._parser(), "infini-data": build_data_parser(), "infini-launch": build_launch_parser()}
FLAGS = {
    flag for parser in PARSERS.values() for each in with_subparsers(parser) for flag in each._option_string_actions
}


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each infini-train and infini-data command of a shell block."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    text = re.sub(r"\d?>&\d", "", text)
    for line in re.sub(r"\$\((?:'[^']*'|[^)'])*\)", "X", text).splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                if command and command[0] in PARSERS:
                    yield command
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):
                command.append(word)


def check_command(command: list[str], may_fail: bool) -> None:
    """The parser takes the command; a shipped config takes its overrides."""
    program, *rest = command
    try:
        options = PARSERS[program].parse_args(rest)
    except SystemExit as error:
        assert error.code == 0, f"{shlex.join(command)}: is refused"  # 0: --help, --version
        return
    if rest[0] == "train" and not may_fail and not options.config.endswith(".yaml"):
        load_run(options.config, options.set, options.world_size)


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_commands_of_blocks_are_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for block in read_page(name)[1]:
        if block.language in SHELLS:
            for command in commands(block):
                check_command(command, may_fail="error: " in block.text)


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_named_options_exist(name: str) -> None:
    for code in inline_code(read_page(name)[0]):
        program = code.split(" ")[0]
        if program in PARSERS and " " in code:
            assert code.split(" ")[1] in {*subparsers(PARSERS[program]), "--help", "--version"}, f"{name}: {code}"
        if program in PARSERS or code.startswith("--"):
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", code)) - FLAGS
            assert not unknown, f"{name}: {code}: no option {', '.join(unknown)}"


TABLES: dict[object, dict[str, type]] = {AttentionVariant: KINDS, SyntheticConfig: SYNTHETIC_KINDS}  # of unions


def config_fields() -> set[str]:
    """The dotted path of every section and field of the schema."""
    found: set[str] = set()

    def visit(parent: type, prefix: str) -> None:
        hints = get_type_hints(parent)
        for field, kind in ((each.name, hints[each.name]) for each in dataclasses.fields(parent)):
            found.add(prefix + field)
            if get_origin(kind) is Mapping:
                continue  # of names; what a name stands for has fields elsewhere
            for section in (kind, *get_args(kind)):
                for variant in TABLES.get(section, {"": section}).values():  # these share a prefix
                    if dataclasses.is_dataclass(variant) and isinstance(variant, type):
                        visit(variant, f"{prefix}{field}.")

    visit(RunConfig, "")
    return found


FIELDS = config_fields()
SECTIONS = {path.split(".")[0] for path in FIELDS if "." in path}


def unknown_fields(codes: list[str]) -> list[str]:
    """Inline code that looks like a config field but is none."""
    found = []
    for code in codes:
        path = re.fullmatch(r"([a-z_]+(?:\.[a-z_0-9]+)+)(?:[=:].*)?", code.removeprefix("--set "))
        is_file = path and path[1].endswith(SUFFIXES)
        if path and not is_file and path[1].split(".")[0] in SECTIONS:
            field = re.sub(r"^model\.attention\.variants\.\w+\.", "model.attention.", path[1])
            found += [code] * (field not in FIELDS)
    return found


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_named_config_fields_exist(name: str) -> None:
    assert unknown_fields(inline_code(read_page(name)[0])) == []


def test_an_unknown_field_is_found() -> None:
    codes = ["train.max_steps=5", "train.max_step", "model.attention.update", "model.attention.updates", "train.md"]
    assert unknown_fields(codes) == ["train.max_step", "model.attention.updates"]
    assert {"seed", "model.attention.overlap_tokens", "log.profile_steps"} <= FIELDS


def test_the_configuration_page_is_that_of_the_schema() -> None:
    """Regenerate with: python docs/generate_configuration.py."""
    generator = runpy.run_path(str(ROOT / "docs" / "generate_configuration.py"))
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == generator["render"]()
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \| (.+?) \| (.*) \|$", page, flags=re.MULTILINE)
    sections = {path for path in FIELDS if any(field.startswith(f"{path}.") for field in FIELDS)}
    assert {path.replace("[]", "") for path, *_ in rows} == FIELDS - sections  # [] marks each of a list
    assert not [path for path, *_, meaning in rows if not meaning], "a comment after the field says what it means"


def test_the_tables_of_checkpoints_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| Field \| Why .*\n.*\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    found = [dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", table, flags=re.MULTILINE)) for table in tables]
    assert found == [resumable_fields(), same_weight_fields()]


def test_the_import_rules_of_the_architecture_are_those_that_are_tested() -> None:
    rules = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| Package \| May import \|\n.*\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    assert rows
    found: dict[str, set[str]] = {name: set() for name in rules["BOTTOM"]} | {
        "command_line": {"config", "exit_codes", "logs"},
        "command_errors": {"config", "exit_codes", "interrupts", "redaction"},
        "interrupts": {"exit_codes"},
        "atomic_files": {"regular_files"},
        "child_processes": {"exit_codes"},
        "environment": {"config"},
        "config": {"regular_files", "redaction"},
        "logs": {"redaction"},
    }  # in prose
    for packages, imports in re.findall(r"^\| (.+) \| (.+) \|$", rows[1], flags=re.MULTILINE):
        stack = rules["STACK"] if "stack" in imports else set()
        found |= {package: set(inline_code(imports)) | stack for package in inline_code(packages)}
    assert found == rules["ROOMS"] | rules["OUTSIDE"]


def test_the_architecture_names_every_package() -> None:
    named = set(inline_code((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    found = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "infini_train").iterdir()}
    kept = {name for name in found if not name.startswith(("__", "."))}
    assert "selftest/" in kept and {f"infini_train/{name}" for name in kept} <= named


def test_the_lists_of_configs_are_complete() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for title, kind in (("Models", "model"), ("Runs", "run")):
        names = re.search(rf"^{title} \(`configs/{kind}/`\): (.+)\.$", page, flags=re.MULTILINE)
        assert names and names[1].split(", ") == sorted(path.stem for path in (ROOT / "configs" / kind).glob("*.yaml"))


def test_the_segments_of_a_window_are_those_of_the_configs() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    segments: dict[str, int] = {}
    for path in (ROOT / "configs" / "run").glob("*.yaml"):
        run = load_run(path.stem)
        segments[path.stem] = run.train.window_tokens // (run.model.segment_tokens or run.train.window_tokens)
    more = {name: count for name, count in segments.items() if count != 16 and "_no_conv" not in name}
    assert more.pop("debug") == 4 and "debug has 4" in page
    assert dict(re.findall(r"(\w+) (\d+)[,)]", re.search(r"some more \((.+\))", page)[1])) == {
        name: str(count) for name, count in more.items()
    }


def test_the_gate_warning_is_that_of_the_code() -> None:
    config = load_run("debug")
    warning = gate_warning(config.optim, config.train.total_steps)
    assert warning and f"\nwarning: {warning}\n" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
