"""The rest of a file, what lies behind a folder that can't be read, a store that fails: nothing is lost in silence."""

import bz2
import gzip
import http.server
import io
import lzma
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from data_tools.documents import ReadOptions
from data_tools.encode import EncodeOptions, EncodeWork, encode_corpus
from data_tools.readers import documents
from data_tools.sources import find_files
from data_tools.storage import require_unchanged
from infini_train.config.errors import ConfigError

LINE = b'{"text": "hello hello hello"}\n'
PACKS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def ids_in(source: Path | str) -> list[str]:
    return [document.id for document in documents([str(source)], ReadOptions())]


def tar_of(name: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        member = tarfile.TarInfo(f"{name}.txt")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    return data.getvalue()


@pytest.mark.parametrize("suffix", PACKS)
def test_a_flipped_bit_between_two_streams_is_an_error(tmp_path, suffix) -> None:
    path, part = tmp_path / f"c.jsonl{suffix}", PACKS[suffix](LINE * 10)
    path.write_bytes(part * 3)
    assert len(ids_in(path)) == 30
    data = bytearray(part * 3)
    data[len(part) + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="can't be read on"):
        ids_in(path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_second_archive_behind_the_first_is_an_error(tmp_path, pack) -> None:
    path = tmp_path / ("c.tar.gz" if pack is gzip.compress else "c.tar")
    path.write_bytes(pack(tar_of("a") + bytes(100_000)))
    assert ids_in(path) == [f"{path.name}:a"]
    path.write_bytes(pack(tar_of("a") + tar_of("b")))
    for source in (str(path), f"pipe:cat {path}"):
        with pytest.raises(ConfigError, match="more follows its end"):
            ids_in(source)


def test_the_checksum_of_a_packed_archive_is_read(tmp_path) -> None:
    data = bytearray(gzip.compress(tar_of("a")))
    data[-6] ^= 1
    (tmp_path / "c.tar.gz").write_bytes(data)
    with pytest.raises(ConfigError, match="CRC check failed"):
        ids_in(tmp_path / "c.tar.gz")


def test_folders_that_cannot_be_read_are_told(tmp_path, monkeypatch) -> None:
    """Root may read all, so the answer about one folder is given here."""
    for name in ("a", "b", "lost+found"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("hello")
    assert ids_in(tmp_path) == [f"{tmp_path.name}/a/x.txt", f"{tmp_path.name}/b/x.txt"]
    locked, access = (str(tmp_path / "b"), str(tmp_path / "lost+found")), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in locked and access(path, mode))
    for pattern in ("*/x.txt", "**/x.txt"):
        with pytest.raises(ConfigError, match="b: can't be read; give permission"):
            ids_in(tmp_path / pattern)
    assert ids_in(tmp_path / "[a]/x.txt") == [f"{tmp_path.name}/a/x.txt"]


def test_a_folder_at_a_url_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("hello")
    assert len(ids_in(f"file://{tmp_path}")) == 2
    plain = LocalFileSystem.ls

    def failing(self, path, *arguments, **options):
        if path.endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return plain(self, path, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", failing)
    with pytest.raises(ConfigError, match="can't be found: .*Permission denied"):
        ids_in(f"file://{tmp_path}")


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.answer)  # type: ignore[attr-defined]
            self.send_header("Content-Length", str(len(LINE)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(LINE)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.answer = 200  # type: ignore[attr-defined]
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_a_store_that_fails_has_not_changed_a_file(server) -> None:
    file = next(find_files([f"http://127.0.0.1:{server.server_port}/c.jsonl"]))
    require_unchanged(file.path, file.bytes, file.version)
    server.answer = 503
    with pytest.raises(ConfigError, match=r"can't be asked whether it has changed: 503.*give the same command again"):
        require_unchanged(file.path, file.bytes, file.version)
    server.answer = 404
    with pytest.raises(ConfigError, match="has changed while the command ran"):
        require_unchanged(file.path, file.bytes, file.version)


def test_permissions_that_change_are_told_as_such(tmp_path, monkeypatch) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(LINE * 300)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(EncodeWork, "__call__", lambda self, task, *rest: 1 / 0)
        encode_corpus([str(path)], "byte", tmp_path / "set", EncodeOptions(part="1/2"))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"have changed since \(.*c.jsonl\): its content, or else its permissions"):
        encode_corpus([str(path)], "byte", tmp_path / "set", EncodeOptions(part="1/2"))
