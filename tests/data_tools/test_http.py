"""Sources and datasets on a real HTTP server (on the loopback interface), also when it fails."""

import functools
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from data_tools import plan  # noqa: E402
from data_tools.encode import EncodeOptions, EncodeWork, encode_corpus  # noqa: E402
from data_tools.readers import documents  # noqa: E402
from infini_train.config.errors import ConfigError  # noqa: E402
from infini_train.data import cache  # noqa: E402
from infini_train.data.manifest import hash_file  # noqa: E402
from infini_train.data.shards import Dataset  # noqa: E402


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with parts on demand, as object stores give them; `server.refused` names what is answered with 500."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, part = Path(self.translate_path(self.path)), re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.path.endswith(self.server.refused):
            self.send_error(500)
        elif path.is_dir() or not path.exists() or part is None:
            super().do_GET()
        else:
            data, first = path.read_bytes(), int(part[1])
            last = min(int(part[2] or len(data)), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(data[first : last + 1])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[http.server.ThreadingHTTPServer]:
    (tmp_path / "web").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        found.refused = ("nothing",)
        found.url = f"http://127.0.0.1:{found.server_port}"
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def write(folder: Path, word: str = "text") -> Path:
    rows = [{"id": i, "text": f"{word} {i} grün\n" * (i % 9 + 1)} for i in range(400)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "c.jsonl"


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.iterdir()}


def test_sources_are_read_as_if_they_lay_here(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_MIN_TASK_BYTES", 9_000)
    path = write(tmp_path / "web")
    encode_corpus([str(path)], "byte", tmp_path / "here")
    encode_corpus([f"{server.url}/c.jsonl"], "byte", tmp_path / "there", EncodeOptions(workers=2))
    assert hashes(tmp_path / "here") == hashes(tmp_path / "there")
    (tmp_path / "web" / "d.txt").write_text("another")
    assert len(list(documents([f"{server.url}/"]))) == 401
    for number in range(3):
        (tmp_path / "web" / f"part-{number}.jsonl").write_text(f'{{"text": "part {number}"}}\n')
    found = list(documents([f"{server.url}/part-{{0..2}}.jsonl"]))
    assert [document.text for document in found] == ["part 0", "part 1", "part 2"]
    assert found[1].id == f"{found[1].source}/part-1.jsonl@0" and server.url.endswith(found[1].source)
    with pytest.raises(ConfigError, match=r"none.jsonl: can't be found"):
        list(documents([f"{server.url}/none.jsonl"]))


def test_a_server_that_fails_loses_nothing_and_a_changed_file_is_noticed(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_MIN_TASK_BYTES", 9_000)
    path, source = write(tmp_path / "web"), [f"{server.url}/c.jsonl"]
    encode_corpus([str(path)], "byte", tmp_path / "whole")
    work = EncodeWork.__call__

    def failing(self, task, *rest) -> None:
        server.refused = ("c.jsonl",) if task == 2 else ("nothing",)
        work(self, task, *rest)

    skip = EncodeOptions(on_bad_record="skip")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"c.jsonl: can't be read on: 500.*again"):
        patch.setattr(EncodeWork, "__call__", failing)
        encode_corpus(source, "byte", tmp_path / "set", skip)
    server.refused = ("nothing",)
    write(tmp_path / "web", "next")  # of the same size, some time later
    new = path.stat().st_mtime + 5
    os.utime(path, (new, new))
    with pytest.raises(ConfigError, match="the sources have changed since"):
        encode_corpus(source, "byte", tmp_path / "set", skip)


def test_a_dataset_comes_over_http_once(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "RETRY_AFTER_S", (0.01,))
    encode_corpus([str(write(tmp_path))], "byte", tmp_path / "web" / "set", EncodeOptions(max_shard_bytes=9_000))
    here = Dataset.open(tmp_path / "web" / "set")
    there = Dataset.open(f"{server.url}/set", tmp_path / "near")
    assert there.identity == here.identity and there.missing_bytes() > 0
    for document in range(0, 400, 7):
        n_tokens = int(here.lengths_tokens[document])
        assert np.array_equal(here.read(document, 0, n_tokens), there.read(document, 0, n_tokens))
    server.refused = (".tar", "manifest.json")
    with pytest.raises(ConfigError, match=r"manifest.json: can't be fetched: 500"):
        Dataset.open(f"{server.url}/set", tmp_path / "near")
    server.refused = ("nothing",)
    cold = Dataset.open(f"{server.url}/set", tmp_path / "cold")
    server.refused = (".tar",)
    with pytest.raises(OSError, match=r"shard-00000.tar: can't be fetched to .*: 500"):
        cold.read(0, 0, 1)
    assert not list((tmp_path / "cold").rglob("*.partial"))
