"""A file that is replaced shows its old content until the new one is complete, and a failure leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infini_train.atomic_files import replacing, write_atomic


@pytest.mark.parametrize("durable", [True, False])
def test_text_and_bytes_replace_what_was_there(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, "naïve ∞\n", durable=durable)
    assert path.read_bytes() == "naïve ∞\n".encode()
    write_atomic(path, b"\r\n\0", durable=durable)
    assert path.read_bytes() == b"\r\n\0" and os.listdir(tmp_path) == ["status.json"]


def test_a_reader_sees_the_old_content_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old" and partial.parent == tmp_path and partial.name.startswith(".")
        partial.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["results.json"]


def test_a_failure_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "file", "text")


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    program = (
        "import os, sys; from pathlib import Path; from infini_train.atomic_files import replacing\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('ne')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"


def test_a_file_for_its_owner_alone_is_never_open_to_others(tmp_path: Path) -> None:
    path = tmp_path / "environment.txt"
    path.write_text("old")
    path.chmod(0o644)
    with replacing(path, permissions=0o600) as partial:
        assert partial.stat().st_mode & 0o777 == 0o600
    write_atomic(path, "new", permissions=0o600)
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "new"
