"""Sources in webdataset's notation: braces and pipes are read as files are, and no shell is ever started."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
import webdataset
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from webdataset.shardlists import expand_urls

from data_tools import plan
from data_tools.clean import CleanOptions, clean_corpus
from data_tools.documents import ReadOptions
from data_tools.encode import EncodeOptions, EncodeWork, encode_corpus
from data_tools.pipes import _shell_operator, split_command
from data_tools.problems import LeftOut
from data_tools.readers import documents
from data_tools.sources import _expand_braces, find_files
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import hash_file

ROOT = Path(__file__).parents[2]
TEXTS = [f"Text {i}: grün\n" * (1 + i % 7) for i in range(40)]


def write_tars(folder: Path, number: int = 4) -> None:
    """corpus-000.tar and so on, ten documents each."""
    folder.mkdir(exist_ok=True)
    for shard in range(number):
        with webdataset.TarWriter(str(folder / f"corpus-{shard:03d}.tar"), mtime=0) as writer:
            for i in range(10 * shard, 10 * shard + 10):
                writer.write({"__key__": f"{i:05d}", "txt": TEXTS[i], "json": {"id": f"k{i}", "title": f"T{i}"}})


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


@given(st.text(st.sampled_from("ab{},.0129"), max_size=12))
def test_braces_expand_as_in_webdataset(name) -> None:
    try:
        theirs = expand_urls(f"{name}.tar")
    except ValueError:  # unbalanced: to us a name like any other
        theirs = [f"{name}.tar"]
    ours = _expand_braces(f"{name}.tar")
    assert ours == theirs if len(theirs) > 1 else ours == [f"{name}.tar"]


def test_braces_name_the_same_documents_as_a_pattern(tmp_path) -> None:
    write_tars(tmp_path / "web")
    encode_corpus([f"{tmp_path}/web/*.tar"], "byte", tmp_path / "pattern")
    for name, out in (("corpus-{000..003}.tar", "range"), ("corpus-{000,001,002,003}.tar", "list")):
        manifests, _ = encode_corpus([f"{tmp_path}/web/{name}"], "byte", tmp_path / out)
        assert [source.name for source in manifests[tmp_path / out].sources] == ["web"]
        assert hashes(tmp_path / out) == hashes(tmp_path / "pattern")
    system = fsspec.filesystem("memory")
    for path in (tmp_path / "web").iterdir():
        system.pipe_file(f"/bucket/web/{path.name}", path.read_bytes())
    encode_corpus(["memory://bucket/web/corpus-{000..003}.tar"], "byte", tmp_path / "url")
    assert hashes(tmp_path / "url") == hashes(tmp_path / "pattern")
    with pytest.raises(ConfigError, match=r"corpus-004.tar: no such file or folder"):
        list(find_files([f"{tmp_path}/web/corpus-{{000..004}}.tar"]))


def test_a_file_whose_name_holds_braces_is_that_file(tmp_path) -> None:
    (tmp_path / "a{1,2}.txt").write_text("braces")
    (tmp_path / "b{.txt").write_text("unbalanced")
    found = documents([tmp_path / "a{1,2}.txt", f"{tmp_path}/b{{*.txt"])
    assert [document.text for document in found] == ["braces", "unbalanced"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_pipe_is_read_as_a_tar_however_it_is_compressed(tmp_path, pack) -> None:
    write_tars(tmp_path / "web")
    for path in (tmp_path / "web").iterdir():
        path.write_bytes(pack(path.read_bytes()))
    source = f"pipe:cat {tmp_path}/web/corpus-{{000..003}}.tar"
    found = list(documents([source]))
    assert [d.text for d in found] == TEXTS and {d.source for d in found} == {source} and found[11].id == "k11"
    if pack is bytes:
        theirs = webdataset.WebDataset(source, shardshuffle=False)
        assert [sample["txt"].decode() for sample in theirs] == TEXTS


def test_a_pipe_may_hold_json_lines_but_nothing_that_is_read_from_its_end(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found = documents([f"pipe:cat '{path}'"], ReadOptions(format="jsonl"))
    assert [document.text for document in found] == TEXTS
    for kind in ("parquet", "megatron"):
        with pytest.raises(ConfigError, match=f"pipe:cat .*: {kind} can't be read from a stream; give files"):
            list(documents([f"pipe:cat {path}"], ReadOptions(format=kind)))


def test_each_pipe_is_a_task_and_a_stopped_run_repeats_only_what_is_missing(tmp_path, monkeypatch) -> None:
    write_tars(tmp_path / "web")
    log = tmp_path / "log"
    script = tmp_path / "fetch"
    script.write_text(f"#!/bin/sh\necho $1 >> {log}\nexec cat {tmp_path}/web/corpus-$1.tar\n")
    script.chmod(0o755)
    source = f"pipe:{script} {{000..003}}"
    encode_corpus([source], "byte", tmp_path / "whole", EncodeOptions(workers=2))
    assert sorted(log.read_text().split()) == ["000", "001", "002", "003"]
    log.unlink()
    work = EncodeWork.__call__

    def stopping(self, task, *rest) -> None:
        if task == 2:
            raise KeyboardInterrupt
        work(self, task, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EncodeWork, "__call__", stopping)
        encode_corpus([source], "byte", tmp_path / "set")
    encode_corpus([source], "byte", tmp_path / "set")
    assert log.read_text().split() == ["000", "001", "002", "003"]
    assert hashes(tmp_path / "set") == hashes(tmp_path / "whole")
    assert len(list(plan.plan_tasks(find_files([source]), 10**9))) == 4


def test_every_reading_runs_the_command_again(tmp_path) -> None:
    """Cleaning with deduplication reads twice; a pattern gives the same texts."""
    write_tars(tmp_path / "web")
    for name, source in (("pipe", f"pipe:cat {tmp_path}/web/corpus-{{000..003}}.tar"), ("files", tmp_path / "web")):
        report = clean_corpus([str(source)], tmp_path / name, CleanOptions(dedup=True))
        assert report.documents == len(TEXTS)
    texts = [[document.text for document in documents([tmp_path / name])] for name in ("pipe", "files")]
    assert texts[0] == texts[1] == TEXTS


@pytest.mark.parametrize("code", ["print('x'); raise SystemExit(3)", "raise SystemExit(3)"])
def test_a_command_that_fails_is_an_error_also_when_bad_records_are_skipped(tmp_path, code) -> None:
    """What is missing is there; to leave it out would lose it."""
    (tmp_path / "fail.py").write_text(code)
    source = f"pipe:{sys.executable} {tmp_path}/fail.py"
    for kind in ("text", "jsonl", "tar"):
        with pytest.raises(ConfigError, match=r"can't be read on: the command ended with status 3; give the same"):
            list(documents([source], ReadOptions(format=kind), LeftOut(on_bad_record="skip", max_bad_records=9)))


def test_a_whole_tar_from_a_command_that_fails_after_it_is_an_error(tmp_path) -> None:
    write_tars(tmp_path, 1)
    (tmp_path / "late").write_text(f"#!/bin/sh\ncat {tmp_path}/corpus-000.tar\nexit 1\n")
    (tmp_path / "late").chmod(0o755)
    with pytest.raises(ConfigError, match="ended with status 1"):
        list(documents([f"pipe:{tmp_path}/late"]))


def test_a_command_whose_output_is_no_longer_wanted_ends() -> None:
    before = threading.active_count()
    found = documents(["pipe:yes text"], ReadOptions(format="jsonl"), LeftOut(on_bad_record="skip", max_bad_records=9))
    with pytest.raises(ConfigError, match="more than 9 bad records"):
        next(found)
    assert threading.active_count() == before


SHELL = {
    "pipe:cat a.tar | zcat": "| needs a shell",
    "pipe:cat a.tar>b": "> needs a shell",
    "pipe:cat a.tar; touch b": "; needs a shell",
    "pipe:cat a.tar && touch b": "&& needs a shell",
    "pipe:cat 'a.tar": "no closing quotation",
    "pipe:": "names no program",
    "pipe:no-such-program a": "no program no-such-program found",
}


@pytest.mark.parametrize("source", SHELL)
def test_what_needs_a_shell_is_refused_before_anything_runs(tmp_path, monkeypatch, source) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        encode_corpus([source], "byte", "set")
    assert str(error.value).startswith(f"{source}: ") and SHELL[source] in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_quoted_operators_and_substitutions_are_plain_arguments() -> None:
    words = ["echo", "|", "a;b", "$(touch", "x)", "`y`", "$HOME", "*"]
    assert split_command("pipe:echo '|' \"a;b\" '$(touch' 'x)' `y` $HOME *") == words
    command = 'pipe:echo --opt="a; \'b" c\\;d'
    assert split_command(command) == ["echo", "--opt=a; 'b", "c;d"]


@given(st.text(st.sampled_from("ab \\'\"|;&>"), max_size=12))
def test_operators_are_seen_exactly_outside_quotations(text) -> None:
    try:
        shlex.split(text)
    except ValueError:
        return
    outside, quote = [], ""
    characters = iter(text)
    for character in characters:
        if character == "\\" and quote != "'":
            next(characters, None)
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            outside.append(character)
    assert (_shell_operator(text) is not None) == any(c in "|;&>" for c in outside)


def test_a_file_that_is_named_like_a_command_is_never_run(tmp_path, monkeypatch) -> None:
    """Found by a folder or a pattern, it is data: only what the user types is a command."""
    monkeypatch.chdir(tmp_path)
    Path("pipe:touch owned.txt").write_text("data")
    for source in (".", "*.txt", "pipe*"):
        assert [document.text for document in documents([source])] == ["data"]
    Path("-").write_text("dash")
    assert [document.text for document in documents(["[-]"])] == ["dash"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["-", "pipe:touch owned.txt"]


def test_a_plan_that_names_another_command_is_refused(tmp_path, monkeypatch) -> None:
    write_tars(tmp_path / "web")

    def stop(self, task, *rest) -> None:
        (self.folder / "task-000009").mkdir()  # something to keep
        raise KeyboardInterrupt

    source = f"pipe:cat {tmp_path}/web/corpus-000.tar"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EncodeWork, "__call__", stop)
        encode_corpus([source], "byte", tmp_path / "set")
    tasks = tmp_path / ".set.partial" / "tasks.jsonl"
    tasks.write_text(tasks.read_text().replace("cat", "tac"))
    with pytest.raises(ConfigError, match=r"tasks.jsonl: is not the plan of these sources"):
        encode_corpus([source], "byte", tmp_path / "set")


@pytest.mark.parametrize(("nodes", "workers", "max_shard_bytes"), [(2, 2, 10_000), (3, 1, 10_000), (2, 2, 10**6)])
def test_the_documented_pipeline_reads_each_document_once(tmp_path, nodes, workers, max_shard_bytes) -> None:
    """The script of docs/data.md, in a process for each node with its workers; also with fewer shards than workers."""
    rows = [{"id": f"k{i}", "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = EncodeOptions(max_shard_bytes=max_shard_bytes)
    encode_corpus([str(tmp_path / "a.jsonl")], "byte", tmp_path / "shards", options)
    assert (len(list((tmp_path / "shards").glob("*.tar"))) >= nodes * workers) is (max_shard_bytes == 10_000)
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"cat > read_shards.py <<'EOF'\n(.*?)\nEOF\n", page, flags=re.DOTALL)
    (tmp_path / "read_shards.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "read_shards.py", str(workers)]
    processes = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(nodes)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(nodes)
    ]
    found = [process.communicate(timeout=100)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * nodes
    expected = [f"k{i} {len(text.encode())}" for i, text in enumerate(TEXTS)]
    assert sorted(line for lines in found for line in lines) == sorted(expected)
    assert max_shard_bytes > 10_000 or all(found)
