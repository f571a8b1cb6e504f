"""Progress: shown on a terminal, silent elsewhere."""

import contextlib
import os
import pty
import random
import sys
import termios
import time

from data_tools import progress
from data_tools.progress import byte_bar, elapsed_time
from data_tools.tokenizer import TokenizerOptions, train_tokenizer


def on_a_terminal(monkeypatch, work) -> str:
    """What the work writes to standard error, which is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
    shown = b""
    with contextlib.suppress(OSError):  # what Linux says at the end of a terminal
        while data := os.read(ours, 1 << 16):
            shown += data
    os.close(ours)
    return shown.decode()


def test_elapsed_time_is_shown_and_removed(monkeypatch) -> None:
    def work() -> None:
        with elapsed_time("sort the keys"):
            time.sleep(1.2)

    shown = on_a_terminal(monkeypatch, work)
    assert "sort the keys: 1 s" in shown and shown.endswith("\r\x1b[K")


def test_training_a_tokenizer_shows_that_it_is_alive(monkeypatch, tmp_path) -> None:
    """SentencePiece trains in C++: the time must go on meanwhile."""
    monkeypatch.setattr(progress, "_TICK_S", 0.02)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=2 + i % 9)) for i in range(20_000)]
    texts = [" ".join(draw.choices(words, k=300)) for _ in range(500)]
    options = TokenizerOptions(vocab_size=4000, threads=1)
    shown = on_a_terminal(monkeypatch, lambda: train_tokenizer(texts, tmp_path / "t.model", options))
    assert shown.count("train on 1 million characters: ") > 2


def test_a_bar_counts_bytes(monkeypatch) -> None:
    def work() -> None:
        with byte_bar("read", 4_000_000, 1_000_000) as advance:
            advance(3_000_000)

    shown = on_a_terminal(monkeypatch, work)
    assert "read: 100%" in shown and "4.00M/4.00M" in shown


def test_nothing_is_shown_without_a_terminal(capsys) -> None:
    with elapsed_time("sort the keys"), byte_bar("read", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
