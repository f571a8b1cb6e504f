"""The command line's own part: a flag for every setting that an error names, and none named below it."""

import argparse
import ast
import dataclasses
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools import cli
from data_tools.clean import CleanOptions
from data_tools.filters import FilterOptions
from data_tools.options import build_parser, flag_of
from data_tools.plan import make_plan
from data_tools.problems import BadRecordError, LeftOut, SettingError
from infini_train.config.errors import ConfigError
from infini_train.data.writer import TargetExistsError

ROOT = Path(__file__).parents[2]
EDGE = {"cli.py", "options.py", "help_texts.py"}
LOWER = [path for path in sorted((ROOT / "data_tools").glob("*.py")) if path.name not in EDGE]
LOWER += [ROOT / "infini_train" / "data" / f"{name}.py" for name in ("writer", "shards", "shard_file", "manifest")]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


FLAGS = {flag for parser in subparsers().values() for flag in parser._option_string_actions if flag.startswith("--")}


def texts_in(tree: ast.Module) -> Iterator[str]:
    """All string constants, also the constant parts of f-strings."""
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def docstrings(tree: ast.Module) -> set[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
    return {text for text in found if text is not None}


def flags_in(code: str) -> set[str]:
    tree = ast.parse(code)
    words = {word for text in set(texts_in(tree)) - docstrings(tree) for word in re.findall(r"--[a-z][a-z-]*", text)}
    return words & FLAGS


@pytest.mark.parametrize("path", LOWER, ids=lambda path: path.name)
def test_lower_code_names_no_flag(path) -> None:
    assert flags_in(path.read_text(encoding="utf-8")) == set()


def test_a_flag_in_lower_code_is_seen() -> None:
    code = (
        'def f(n):\n    """As --holdout."""\n    raise ValueError(f"--holdout: {n} is wrong, or pass --overwrite now")'
    )
    assert flags_in(code) == {"--holdout", "--overwrite"}


def settings_in(tree: ast.Module) -> Iterator[str]:
    """Names in braces in plain strings, but for those that calls fill with values."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = {k.arg for call in calls if ast.unparse(call.func).endswith("Error") for k in call.keywords}
    f_strings = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "{" in node.value:
            if id(node) in f_strings or node.value in docstrings(tree):
                continue
            try:
                names = [name for _, name, *_ in string.Formatter().parse(node.value) if name]
            except ValueError:
                continue
            yield from (name for name in names if name.isidentifier() and name not in given)


def test_every_setting_that_an_error_names_has_a_flag() -> None:
    found = {name for path in LOWER for name in settings_in(ast.parse(path.read_text(encoding="utf-8")))}
    assert {"holdout", "max_record_bytes", "languages", "threshold", "vocab_size", "part"} <= found
    commands = subparsers()
    for name in found:
        flags = {flag_of(command, name) for command in commands}
        assert any(flag in parser._option_string_actions for flag in flags for parser in commands.values()), name


def test_every_field_of_the_options_has_a_flag() -> None:
    """An unfinished run that differs in it is refused by its name."""
    for command, names in {
        "encode": ("tokenizer", "holdout", "shard_mb", "text_field", "id_field", "keep_fields", "format", "prompt"),
        "clean": ("nfc", "strip_controls", "max_repeated_lines", "languages", "near_dedup", "threshold", "dedup"),
        "near-dedup": ("threshold", "task_mb", "max_record_bytes", "arguments"),
    }.items():
        for name in names:
            assert flag_of(command, name) in subparsers()[command]._option_string_actions, name


def test_errors_speak_the_language_of_their_reader() -> None:
    error = SettingError("{threshold}: {given} is not a share", given="{threshold}")
    assert str(error) == "threshold: {threshold} is not a share"  # a value that looks like a setting is none
    assert cli.explain(error, "clean") == "--near-dedup: {threshold} is not a share"
    assert cli.explain(error, "near-dedup") == "--threshold: {threshold} is not a share"
    assert cli.explain(ConfigError("plain"), "encode") == "plain"
    exists = TargetExistsError("d: a dataset is there already; choose another folder")
    assert cli.explain(exists, "encode") == f"{exists}, or pass --overwrite"
    with pytest.raises(BadRecordError) as caught:
        LeftOut().bad("a.jsonl:1", "no field '{x}'", "choose with {text_field}")
    assert str(caught.value) == "a.jsonl:1: no field '{x}'; choose with text_field, or pass on_bad_record skip"
    shown = "a.jsonl:1: no field '{x}'; choose with --text-field, or pass --on-bad-record skip"
    assert cli.explain(caught.value, "encode") == shown


def test_unfinished_work_names_the_flag_that_differs(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for languages in ([], ["de"]):
        try:
            make_plan(tmp_path, [str(tmp_path / "a.txt")], {"languages": languages}, 10**6)
        except SettingError as error:
            shown = cli.explain(error, "clean")
    assert shown == (
        f"{tmp_path}: holds unfinished work of another command (--language differs); rerun the original command to"
        " resume it, or pass --restart to begin again"
    )


def test_an_error_of_a_worker_keeps_its_settings(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(b"no gzip")
        (tmp_path / f"{name}.jsonl").write_text('{"body": "x"}\n' * 900_000)
    arguments = ["encode", "a.jsonl", "b.jsonl", "--tokenizer", "byte", "--out", "set", "--workers", "2"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "no field 'body'" not in error
    assert "no field 'text'; the fields here are: body; choose with --text-field, or pass --on-bad-record skip" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "-1"], "error: --workers: must not be negative"),
        (["--shard-mb", "0"], "error: --shard-mb: must be positive"),
        (["--max-record-mb", "nan"], "error: --max-record-mb: must be positive"),
        (["--max-tokens", "0"], "error: --max-tokens: must be positive"),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_flag(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["encode", "a", "--tokenizer", "byte", "--out", "d", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def numbers() -> Iterator[tuple[str, str]]:
    """Each option that takes a number, with its command."""
    for command, parser in subparsers().items():
        for action in parser._actions:
            if action.option_strings and action.metavar in ("N", "S", "MB", "GB", "SHARE"):
                yield command, action.option_strings[0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "1.7e308", "-1", "1e23", "", "x", "9" * 5000])
def test_numbers_that_are_none_or_beyond_any_use_are_refused(tmp_path, capsys, monkeypatch, value) -> None:
    """By the parser or by the code below: a line, no traceback, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n' * 9)
    arguments = {"clean": ["--out", "o"], "near-dedup": ["--out", "o"], "tokenizer": ["--out", "o.model"]}
    arguments |= {"encode": ["--tokenizer", "byte", "--out", "o"], "fertility": ["--tokenizer", "byte"]}
    arguments |= {"split": ["--out", "o"], "inspect": [], "verify": []}
    found = list(numbers())
    assert {command for command, _ in found} == set(arguments)
    for command, flag in found:
        if (flag, value) == ("--seed", "-1"):
            continue
        try:
            code = cli.main([command, "a.jsonl", f"{flag}={value}", *arguments[command]])
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and "error: " in capsys.readouterr().err, (command, flag)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"], (command, flag)


@pytest.mark.parametrize("command", ["encode", "clean"])
def test_the_largest_numbers_that_are_taken_do_no_harm(tmp_path, command) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n' * 9)
    rest = ["--tokenizer", "byte", "--shard-mb", "1e9"] if command == "encode" else []
    out = str(tmp_path / "o")
    assert cli.main([command, str(tmp_path / "a.jsonl"), "--out", out, "--max-record-mb", "1e9", *rest]) == 0


def test_defaults_are_shown_in_one_way() -> None:
    """Each option with a default of its own says it in brackets at the end of its help."""
    for command, parser in subparsers().items():
        for action in parser._actions:
            shown = action.help or ""
            assert not re.search(r"\(title\)|: 1000$|^default", shown), f"{command} {action.option_strings}"
            if action.default not in (None, False, argparse.SUPPRESS) and action.option_strings:
                assert re.search(r"\(default: [^)]+\)$", shown), f"{command} {action.option_strings}: {shown}"


def test_every_field_of_the_filters_is_an_option() -> None:
    """`clean` reads all of them by name; one without an option would do nothing."""
    plain = vars(build_parser().parse_args(["clean", "a.jsonl", "--out", "b"]))
    for field in dataclasses.fields(FilterOptions):
        assert plain[field.name] == field.default, field.name


def test_the_filters_reach_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[FilterOptions] = []

    def stop(sources: object, out: object, options: CleanOptions) -> None:
        given.append(options.filters)
        raise ConfigError("enough")

    monkeypatch.setattr(cli, "clean_corpus", stop)
    words = "--nfc --strip-controls --min-chars 1 --max-chars 9 --max-repeated-lines 0.5 --max-symbols 0.25"
    assert cli.main(["clean", "a.jsonl", "--out", "b", *words.split(), "--language", "en,de"]) == 2
    expected = FilterOptions(
        nfc=True,
        strip_controls=True,
        min_chars=1,
        max_chars=9,
        max_repeated_lines=0.5,
        max_symbols=0.25,
        languages=("en", "de"),
    )
    assert given == [expected]
    assert all(getattr(expected, field.name) != field.default for field in dataclasses.fields(FilterOptions))
