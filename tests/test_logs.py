"""Which lines a command shows, on which stream, on which rank."""

import logging
import os
import re
import subprocess
import sys

import pytest

from infini_train.cli import main
from infini_train.logs import console, is_quiet

RUN, EVAL = logging.getLogger("infini_train.train.loop"), logging.getLogger("infini_train.inference.loading")


def speak() -> None:
    for log, name in ((RUN, "run"), (EVAL, "eval")):
        log.debug("%s debug", name)
        log.info("%s note", name)
        log.warning("%s warning", name)
        log.error("%s error", name)


@pytest.mark.parametrize(
    ("settings", "out", "err"),
    [
        ({}, ["run note", "run warning", "eval note"], ["run error", "eval warning", "eval error"]),
        ({"quiet": True}, ["run warning"], ["run error", "eval warning", "eval error"]),
        ({"rank": 1}, [], ["run error", "eval warning", "eval error"]),
        (
            {"notes_to_stderr": True},
            [],
            ["run note", "run warning", "run error", "eval note", "eval warning", "eval error"],
        ),
    ],
)
def test_lines_go_where_they_belong(settings, out, err, capsys):
    with console(**settings):
        speak()
        assert is_quiet() == ("quiet" in settings)
    shown = capsys.readouterr()
    assert (shown.out.splitlines(), shown.err.splitlines()) == (out, err)


@pytest.mark.parametrize("verbose", [False, True])
def test_passwords_of_urls_are_not_shown(verbose: bool, capsys) -> None:
    with console(verbose=verbose):
        RUN.info("reads %s", "https://user:secret@host/data")
    assert capsys.readouterr().out.endswith("reads https://user:***@host/data\n")


def test_verbose_names_time_and_rank_and_shows_every_ranks_debug_lines(capsys):
    with console(3, verbose=True):
        speak()
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == ["rank 3: run debug", "rank 3: eval debug"]


def test_nothing_is_left_behind(capsys):
    logger = logging.getLogger("infini_train")
    before = logger.level, logger.propagate, list(logger.handlers)
    with pytest.raises(ZeroDivisionError), console():
        raise ZeroDivisionError
    assert (logger.level, logger.propagate, logger.handlers) == before
    RUN.info("nobody asked for the log")
    assert capsys.readouterr() == ("", "") and not is_quiet()


def test_a_reader_that_has_gone_does_not_stop_the_run():
    program = (
        "import logging, sys; from infini_train.logs import console\n"
        "with console():\n"
        "    sys.stdin.readline()\n"
        "    for step in range(100): logging.getLogger('infini_train.train').info('x' * 1000)\n"
        "sys.stderr.write('done')\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        process.stdout = None
        assert process.communicate("go\n", timeout=60)[1] == "done" and process.returncode == 0


@pytest.mark.parametrize("arguments", [("--quiet", "--verbose"), ("-q", "-v")])
def test_quiet_and_verbose_exclude_each_other(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "debug", *arguments])
    assert caught.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_a_test_but_not_a_training_run(monkeypatch):
    for log in (RUN, EVAL):
        read_end, write_end = os.pipe()
        os.close(read_end)
        with os.fdopen(write_end, "w") as gone, console():
            monkeypatch.setattr(sys, "stdout", gone)
            if log is RUN:
                log.info("goes on")
                log.info("still")
            else:
                with pytest.raises(BrokenPipeError):
                    log.info("ends")
                os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())  # what is buffered has to go somewhere
