"""The help of every command: examples that parse, and defaults shown one way."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from infini_train import cli
from infini_train.checkpoint import commands
from infini_train.eval import commands as evaluations

COMMANDS = ("train", "eval", "generate", "checkpoint", "demo")
NO_DEFAULT = ("kinds", "nodes")  # leave something out, or stand for another option


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_examples(call, command, capsys):
    assert call(command, "--help") == 0
    said = capsys.readouterr().out
    assert "examples:\n" in said and said.count(f"infini-train {command}") >= 3
    assert all(len(line) <= 120 for line in said.splitlines())


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield parser
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        for command in action.choices.values():
            yield from parsers(command)


def test_help_of_every_option_says_its_default():
    """Defaults of options that take a value; what a list or a flag does without being given goes without saying."""
    seen = 0
    for parser in parsers(cli._parser()):
        for action in parser._actions:
            is_list = isinstance(action, argparse._AppendAction) or action.metavar == "FILE"
            is_hidden = action.help == argparse.SUPPRESS
            if action.option_strings and action.nargs != 0 and not (action.required or is_list or is_hidden):
                where = f"{parser.prog} {action.option_strings[0]}"
                text = " ".join(parser._get_formatter()._expand_help(action).split())
                assert "default: " in text or action.dest in NO_DEFAULT, where
                if action.default not in (None, ""):
                    default = action.default
                    if isinstance(default, tuple):
                        default = " ".join(map(str, default))
                    assert f"(default: {str(default).strip()})" in text, where
                seen += 1
    assert seen > 50


def test_help_waits_for_no_library():
    """What takes seconds to import comes when a command runs."""
    heavy = "{'torch', 'matplotlib', 'deepspeed', 'lm_eval', 'rouge_score'}"
    code = f"import sys, infini_train.cli; infini_train.cli._parser(); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


def test_help_and_version(call, capsys):
    assert call("--help") == 0
    said = capsys.readouterr().out
    assert all(f"infini-train {command}" in said for command in COMMANDS)
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("infini-train ")
    assert call() == 2 and "COMMAND" in capsys.readouterr().err


def test_examples_in_help_parse(capsys):
    """Every example's configs and fields exist."""
    examples = cli.EPILOG + cli.TRAIN_EXAMPLES + cli.GENERATE_EXAMPLES + cli.DEMO_EXAMPLES
    examples += evaluations.EXAMPLES + "".join(module.EXAMPLES for module, _ in evaluations.EVALUATIONS.values())
    examples += commands.EXAMPLES + commands.INSPECT_EXAMPLES + commands.VERIFY_EXAMPLES + commands.RESHARD_EXAMPLES
    lines = [line for line in examples.splitlines() if line.startswith("  infini-train ")]
    assert len(lines) > 12
    for line in lines:
        command = re.split(r" > | {4,}", line.strip())[0]  # a remark follows after some space
        words = shlex.split(command)[1:]
        options = cli._parser().parse_args(words)
        if words[0] == "train":
            options.print_config = True
            options.command(options)
    assert "segment_tokens: 128" in capsys.readouterr().out
