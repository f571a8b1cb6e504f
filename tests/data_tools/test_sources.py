"""What is found where: names in any case, linked folders, what is no file; and files that change while being read."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_tools import cli, pipes, plan
from data_tools.clean import CleanOptions, CleanWork, clean_corpus
from data_tools.documents import ReadOptions
from data_tools.encode import EncodeOptions, EncodeWork, encode_corpus
from data_tools.problems import LeftOut
from data_tools.readers import documents
from data_tools.sources import find_files
from data_tools.verify import verify
from infini_train.config.errors import ConfigError
from infini_train.data.manifest import read_manifest

LINE = b'{"text": "hello hello hello"}\n'
OTHER = b'{"text": "other other other"}\n'


def texts_in(*sources: Path | str, **options) -> list[str]:
    return [document.text for document in documents([str(source) for source in sources], ReadOptions(**options))]


def call(*words: object) -> int:
    return cli.main([str(word) for word in words])


# ------------------------------------------------------------------------------------------- files that change


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(OTHER)


def replace(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(OTHER * 300)
    new.rename(path)


def rewrite(path: Path) -> None:
    """As many bytes, and the time of the last change put back."""
    before = path.stat()
    path.write_bytes(OTHER * 300)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], None]] = {
    "grows": append,
    "shrinks": lambda path: os.truncate(path, 10 * len(LINE)),
    "is emptied": lambda path: os.truncate(path, 0),
    "vanishes": lambda path: path.unlink(),
    "is replaced": replace,
    "is rewritten": rewrite,
    "becomes a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.fixture
def small_tasks(monkeypatch) -> None:
    monkeypatch.setattr(plan, "_MIN_TASK_BYTES", 3000)
    monkeypatch.setattr(pipes, "_WRITER_PATIENCE_S", 0.1)


@pytest.mark.parametrize("when", ["between the tasks", "after the last task"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("skip", ["error", "skip"])
def test_a_source_that_changes_while_it_is_encoded_is_named(
    tmp_path, small_tasks, monkeypatch, capsys, change, when, skip
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(LINE * 300)
    last, work = {"between the tasks": 1, "after the last task": 2}[when], EncodeWork.__call__

    def changing(self, task, *rest) -> None:
        work(self, task, *rest)
        if task == last:
            CHANGES[change](path)

    monkeypatch.setattr(EncodeWork, "__call__", changing)
    arguments = ("encode", path, "--tokenizer", "byte", "--out", tmp_path / "set", "--workers", "1")
    assert call(*arguments, "--on-bad-record", skip) == 2
    error = capsys.readouterr().err
    assert f"{path}: has changed while the command ran" in error
    assert "let nothing write to the sources, then begin again" in error
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("dedup", [False, True])
def test_a_source_that_changes_while_it_is_cleaned_is_named(tmp_path, small_tasks, monkeypatch, dedup) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(b'{"text": "%d"}\n' % i for i in range(600)))
    work = CleanWork.__call__

    def changing(self, task, *rest) -> None:
        if task == 1:
            os.truncate(path, 5000)
        work(self, task, *rest)

    monkeypatch.setattr(CleanWork, "__call__", changing)
    with pytest.raises(ConfigError, match=r"c.jsonl: has changed while the command ran \(9,490 bytes before, 5,000"):
        clean_corpus([str(path)], tmp_path / "out", CleanOptions(dedup=dedup))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["tokenizer", "fertility"])
def test_a_source_that_changes_while_it_is_read_once_is_named(tmp_path, monkeypatch, capsys, command) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(LINE * 300)

    def changing(*arguments) -> Iterator[object]:
        for number, document in enumerate(documents(*arguments)):
            if number == 100:
                append(path)
            yield document

    monkeypatch.setattr("data_tools.cli.documents", changing)
    monkeypatch.setattr("data_tools.readers.documents", changing)
    rest = ("--out", tmp_path / "t.model") if command == "tokenizer" else ("--tokenizer", "byte")
    assert call(command, path, *rest) == 2
    assert f"{path}: has changed while the command ran (9,000 bytes before, 9,030 now)" in capsys.readouterr().err
    assert not (tmp_path / "t.model").exists()


def test_a_rewritten_source_is_noticed_when_work_is_resumed(tmp_path, small_tasks, monkeypatch) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(LINE * 300)
    monkeypatch.setattr(EncodeWork, "__call__", lambda self, task, *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_corpus([str(path)], "byte", tmp_path / "set", EncodeOptions(part="1/2"))
    rewrite(path)
    with pytest.raises(ConfigError, match=r"the sources have changed since \(.*c.jsonl\)"):
        encode_corpus([str(path)], "byte", tmp_path / "set", EncodeOptions(part="1/2"))


# --------------------------------------------------------------------------------------------- names and formats


def test_linked_folders_are_read_once_and_loops_end(tmp_path) -> None:
    root, store = tmp_path / "root", tmp_path / "store"
    for name in ("root/a/x.txt", "root/.hidden/h.txt", "store/deep/y.txt", "store/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (root / "link").symlink_to(store)
    (root / "same").symlink_to(store / "deep")
    (root / "inside").symlink_to(root / "a")
    (root / "hidden").symlink_to(root / ".hidden")
    (root / "a" / "up").symlink_to(root)
    (store / "back").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "file.txt").symlink_to(store / "z.txt")
    notes: list[str] = []
    found = [(file.id, Path(file.path).read_text()) for file in find_files([str(root)], notes.append)]
    assert found == [
        ("root/file.txt", "store/z.txt"),
        ("root/a/x.txt", "root/a/x.txt"),
        ("root/hidden/h.txt", "root/.hidden/h.txt"),
        ("root/link/z.txt", "store/z.txt"),
        ("root/same/y.txt", "store/deep/y.txt"),
    ]
    assert notes == [f"{root}: left out link to a folder above (2), without a suffix (1); {NAME_IT}"]


NAME_IT = "name a file to read it all the same"


def test_what_a_folder_leaves_out_is_told(tmp_path, capsys) -> None:
    for name in ("a.txt", "b.html", "c.HTML", "d.json", "e", ".hidden", "f.bin", "report.json"):
        (tmp_path / name).write_text("text")
    assert call("encode", tmp_path, "--tokenizer", "byte", "--out", tmp_path / "set") == 0
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: left out .html (2), .json (1), without a suffix (1), .bin (1); {NAME_IT}\n"
    )


def test_a_folder_without_permission_is_never_left_out(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)  # root may read everything
    with pytest.raises(ConfigError, match="closed: can't be read: Permission denied; give permission, or leave it out"):
        texts_in(tmp_path)


# --------------------------------------------------------------------------------------- pipes, devices, sockets


def test_what_is_no_file_is_left_out_of_folders_and_patterns_and_refused_by_name(tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "d.txt"))
    assert texts_in(tmp_path) == ["text"] == texts_in(f"{tmp_path}/*.txt")
    for shown in (tmp_path, f"{tmp_path}/*.txt"):
        note = f"note: {shown}: left out named pipe (1), device (1), socket (1); {NAME_IT}\n"
        assert note in capsys.readouterr().err or shown != tmp_path
    for name, kind in {"c.txt": "a device", "d.txt": "a socket"}.items():
        with pytest.raises(ConfigError, match=rf"{name}: is {kind}, not a file; give files"):
            texts_in(tmp_path / name)


def test_a_named_pipe_is_read_while_a_program_writes_into_it(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(LINE * 90_000))  # more than a pipe holds
    writer.start()
    assert texts_in(path) == ["hello hello hello"] * 90_000
    writer.join()


def test_a_named_pipe_without_a_program_is_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pipes, "_WRITER_PATIENCE_S", 0.1)
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="a.txt: can't be read on: is a named pipe that no program writes into"):
        texts_in(tmp_path / "a.txt")


def test_output_of_a_shells_command_is_a_source(tmp_path) -> None:
    program = "import sys; from data_tools.cli import main; sys.exit(main())"
    script = f'exec "$1" -c "{program}" encode <(printf one) <(printf two)'
    done = subprocess.run(
        ["bash", "-c", f"{script} --tokenizer byte --out set --workers 2", "-", sys.executable],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and read_manifest(tmp_path / "set").documents == 2, done.stderr


@pytest.mark.parametrize("source", ["-", "a.jsonl"])
def test_standard_streams_may_be_closed(tmp_path, source) -> None:
    """No file then takes their numbers, so that what is printed does not go into a shard."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "%s"}\n' % (b"x" * 1_000_000) * 17)  # more than a task
    program = "import sys; from data_tools.cli import main; sys.exit(main())"
    script = f'exec 0<&- 1>&- 2>&-; exec "$1" -c "{program}" encode "$2" --tokenizer byte --out set --workers 2'
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    words = ["bash", "-c", script, "-", sys.executable, source]
    done = subprocess.run(words, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == (2 if source == "-" else 0)
    if source != "-":
        assert verify(tmp_path / "set") == [] and read_manifest(tmp_path / "set").documents == 17


def test_a_stream_is_not_read_twice(tmp_path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    for source in ("-", str(tmp_path / "a.txt")):
        with pytest.raises(ConfigError, match="dedup and threshold: read the sources twice, which a stream can't be"):
            clean_corpus([source], tmp_path / "out", CleanOptions(dedup=True))


def test_bad_records_are_left_out_of_what_has_not_changed(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE + b"{\n" + LINE)
    left_out = LeftOut(on_bad_record="skip")
    assert len(list(documents([str(tmp_path)], left_out=left_out))) == 2
    assert left_out.documents == {"bad records": 1}
