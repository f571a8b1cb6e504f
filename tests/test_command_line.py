"""What the parsers of all commands share: values, commands that may be left out, renamed options, the spinner."""

import argparse
import io
import sys
import time
from pathlib import Path

import pytest

from infini_train import cli, command_line, logs
from infini_train.command_line import (
    CLEAR_LINE,
    CommandParser,
    RenamedOption,
    Spinner,
    format_length,
    location,
    non_negative,
    parse_length,
    path,
    positive,
    positive_float,
    processes,
    seed,
    workers,
)
from infini_train.config.errors import ConfigError


def test_lengths_are_read():
    assert [parse_length(text) for text in ("5000", "32K", "1M", "10m")] == [5000, 32768, 2**20, 10 * 2**20]
    assert [format_length(tokens) for tokens in (5000, 32768, 2**20, 1536)] == ["5000", "32K", "1M", "1536"]


@pytest.mark.parametrize("text", ["32KB", "-5"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_length(text)
    assert str(caught.value) == f"--lengths: {text} is no length; write tokens as 5000, 32K or 1M"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive, ("1", "20"), ("0", "-1", "1.5", "x", "9" * 30, "9" * 5000)),
        (non_negative, ("0", "20"), ("-1", "1.5", "x", "9" * 30)),
        (seed, ("0", "4294967296"), ("-1", "1e3", "100000000000000000000000")),
        (processes, ("1", "1024"), ("0", "1025", "1000000")),
        (workers, ("0", "1024"), ("-1", "1025")),
        (positive_float, ("0.5", "4", "1e-3"), ("0", "-0.5", "inf", "nan", "x")),
    ],
)
def test_types_of_values(kind, good, bad):
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


@pytest.mark.parametrize("text", ["2048M", "9" * 30 + "K", "9" * 5000])
def test_a_length_beyond_all_measurements_is_refused(text):
    with pytest.raises(ConfigError, match="is too long; at most 1024M$"):
        parse_length(text)


def test_a_tilde_before_a_task_file_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/tmp/mine")
    options = cli._parser().parse_args(["eval", "harness", "run", "--tasks=~/t.yaml", "--include-path=~"])
    assert (options.tasks, options.include_path) == (["/tmp/mine/t.yaml"], Path("/tmp/mine"))


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/tmp/mine")
    assert path("~/runs") == Path("/tmp/mine/runs") and path("a/~") == Path("a/~")
    assert [location(text) for text in ("~/a", "~", "-", "s3://b/~/c", "./~/a")] == [
        "/tmp/mine/a",
        "/tmp/mine",
        "-",
        "s3://b/~/c",
        "./~/a",
    ]


@pytest.mark.parametrize("text", ["", "a\0b", "x" * 256, "x/" * 3000])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        path(text)


def parser_of() -> CommandParser:
    parser = CommandParser(prog="eval")
    commands = parser.add_subparsers(required=True)
    for name in ("first", "second"):
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("--count", type=positive)
        command.set_defaults(command=name)
    parser.commands, parser.default = dict(commands.choices), commands.choices["first"]
    return parser


@pytest.mark.parametrize(
    ("arguments", "command", "model"),
    [
        (["run"], "first", "run"),
        (["run", "--count", "2"], "first", "run"),
        (["--count", "2", "run"], "first", "run"),
        (["--count=2", "second"], "first", "second"),  # only the first argument names a command
        (["first", "run"], "first", "run"),
        (["second", "run", "--count", "2"], "second", "run"),
        (["second", "second"], "second", "second"),
        (["./second"], "first", "./second"),
    ],
)
def test_a_command_may_be_left_out(arguments, command, model):
    before = list(arguments)
    options = parser_of().parse_args(arguments)
    assert (options.command, options.model) == (command, model)
    assert options.count == (2 if len(arguments) > 2 or "--count=2" in arguments else None)
    assert arguments == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "error: the following arguments are required: {first,second}; see eval --help"),
        (["run", "--bogus"], "error: unrecognized arguments: --bogus; see eval --help"),
        (["second"], "error: the following arguments are required: model; see eval second --help"),
        (["--count", "0", "run"], "error: --count: must be positive; see eval first --help"),
    ],
)
def test_mistakes_are_one_line_of_the_parsers_own(arguments, line, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of().parse_args(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err == f"{line}\n"


def test_a_renamed_option_still_works_and_says_so(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--depths", nargs="+", default=["0"])
    parser.add_argument("--positions", action=RenamedOption, dest="depths", new="--depths", nargs="+")
    assert parser.parse_args([]).depths == ["0"]
    assert parser.parse_args(["--depths", "1", "2"]).depths == ["1", "2"]
    assert capsys.readouterr().err == ""
    assert parser.parse_args(["--positions", "1", "2"]).depths == ["1", "2"]
    assert capsys.readouterr().err == "note: --positions is now called --depths\n"
    assert "--positions" not in parser.format_help()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_spinner_turns_on_a_terminal_only(monkeypatch):
    for stream, quiet in ((Terminal(), False), (io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(command_line.sys, "stderr", stream)
        with (
            logs.console(quiet=quiet),
            pytest.raises(KeyboardInterrupt),
            Spinner("loading", interval_s=0.01) as spinner,
        ):
            time.sleep(0.1)
            spinner.text = "more"
            time.sleep(0.1)
            raise KeyboardInterrupt
        shown = stream.getvalue()
        if stream.isatty() and not quiet:
            assert shown.startswith(f"{CLEAR_LINE}| loading (0 s)\r{CLEAR_LINE}/ loading (0 s)\r")
            assert " more (0 s)" in shown and shown.endswith(CLEAR_LINE)
        else:
            assert shown == ""


def test_a_short_wait_shows_nothing(monkeypatch):
    monkeypatch.setattr(command_line.sys, "stderr", stream := Terminal())
    with Spinner("loading", after_s=60):
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_bars_show_on_a_terminal_unless_quiet(monkeypatch):
    for stream, quiet in ((Terminal(), False), (io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with logs.console(quiet=quiet), logs.progress_bar(total=2, desc="tokens", file=stream) as bar:
            bar.update(2)
        assert ("tokens" in stream.getvalue()) == (stream.isatty() and not quiet)
