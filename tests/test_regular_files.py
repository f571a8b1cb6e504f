"""What is no regular file is refused at once; links only where they belong."""

import os
import socket
import threading
from pathlib import Path

import pytest

from infini_train.atomic_files import write_atomic
from infini_train.regular_files import open_own, open_regular, read_regular, require_regular


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    server = socket.socket(socket.AF_UNIX)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with server:
        for use in (require_regular, open_regular, lambda path: read_regular(path, 10)):
            with pytest.raises(OSError, match=f"x'|{kind}") as caught:
                use(path)
            assert caught.value.strerror and (kind in caught.value.strerror), caught.value


def test_links_are_followed_where_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert open_regular(tmp_path / "link").read() == b"content"
    with pytest.raises(OSError, match="is a link"):
        open_regular(tmp_path / "link", follow_links=False)
    with pytest.raises(OSError, match="is a link"):
        open_own(tmp_path / "link", truncate=True)
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_file_is_read_within_a_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert read_regular(tmp_path / "file", 7) == b"content"
    with pytest.raises(OSError, match="more than 6 bytes"):
        read_regular(tmp_path / "file", 6)


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    """Neither one with the file's name nor one with that of the partial file."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "status.json").symlink_to("victim")
    (tmp_path / f".status.json.partial-{os.getpid()}-{threading.get_ident()}").symlink_to("victim")
    write_atomic(tmp_path / "status.json", "{}")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "status.json").is_symlink() and (tmp_path / "status.json").read_text() == "{}"
