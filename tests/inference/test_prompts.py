"""Prompts from a command line, a file, a pipe; whatever is no text is refused in one line."""

import os
import threading
from pathlib import Path

import pytest

from infini_train.config.errors import ConfigError
from infini_train.inference import prompts
from infini_train.inference.prompts import check_text, read_prompt


def test_a_file_and_a_pipe_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\n".encode())
    assert read_prompt("", tmp_path / "a.txt") == "é\r\n"  # without the byte order mark
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("from a pipe"))
    writer.start()
    assert read_prompt("", tmp_path / "pipe") == "from a pipe"
    writer.join()


def test_what_can_not_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match=r"^--prompt-file: .*a.txt is not UTF-8 \(byte 2\); convert it$"):
        read_prompt("", tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r"^--prompt-file: .* can't be read: Is a directory$"):
        read_prompt("", tmp_path)
    with pytest.raises(ConfigError, match=r"^--prompt-file: .* can't be read: No such file"):
        read_prompt("", tmp_path / "b.txt")
    with pytest.raises(ConfigError, match=r"^--prompt-file: .* can't be read: File name too long$"):
        read_prompt("", tmp_path / ("b" * 300))
    monkeypatch.setattr(prompts, "MAX_PROMPT_BYTES", 2**20)
    with pytest.raises(ConfigError, match=r"^--prompt-file: /dev/zero holds more than 1 MiB; give less$"):
        read_prompt("", Path("/dev/zero"))


def test_bytes_of_the_command_line_that_are_no_text_are_refused():
    given = os.fsdecode(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"^--prompt: is not UTF-8 \(byte 3\); convert it$"):
        read_prompt(given, None)
    with pytest.raises(ConfigError, match=r"^--separator: is not UTF-8 \(byte 3\)"):
        check_text(given, "--separator")
    assert read_prompt("café", None) == read_prompt("caf\udcc3\udca9", None) == "café"  # of a locale without UTF-8
    with pytest.raises(ConfigError, match=r"^--prompt: is not UTF-8 \(byte 0\)"):
        read_prompt("\ud800", None)
