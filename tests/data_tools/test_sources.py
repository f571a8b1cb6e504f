"""What is found where: names in any case, linked folders, what is no file; and files that change while being read."""

import bz2
import gzip
import io
import lzma
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

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


def test_suffixes_are_read_in_any_case(tmp_path) -> None:
    import gzip

    import zstandard

    for number, (name, pack) in enumerate(
        {
            "D.JSONL": bytes,
            "E.Jsonl.GZ": gzip.compress,
            "F.NDJSON.Zst": zstandard.compress,
            "G.jsonl.zstd": zstandard.compress,
            "H.JSONL.XZ": lzma.compress,
            "I.jsonl.BZ2": bz2.compress,
        }.items()
    ):
        (tmp_path / name).write_bytes(pack(b'{"text": "one %d"}\n{"text": "two"}\n' % number))
    (tmp_path / "A.TXT").write_text("a book")
    (tmp_path / "B.Md").write_text("a page")
    lines = [text for number in range(6) for text in (f"one {number}", "two")]
    assert texts_in(tmp_path) == ["a book", "a page", *lines]
    assert texts_in(tmp_path / "E.Jsonl.GZ") == ["one 1", "two"]


PACKED = {
    "a.TAR": bytes,
    "a.Tar.Gz": gzip.compress,
    "a.TGZ": gzip.compress,
    "a.tzst": zstandard.compress,
    "a.txz": lzma.compress,
    "a.tbz2": bz2.compress,
}


def tar_of(name: str, text: bytes) -> bytes:
    data, member = io.BytesIO(), tarfile.TarInfo(name)
    member.size = len(text)
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(member, io.BytesIO(text))
    return data.getvalue()


@pytest.mark.parametrize("name", PACKED)
def test_tars_are_found_by_all_their_names(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(PACKED[name](tar_of("0.txt", b"hello")))
    assert texts_in(tmp_path) == ["hello"]


def test_a_tar_never_becomes_one_text(tmp_path) -> None:
    (tmp_path / "corpus.1").write_bytes(tar_of("0.txt", b"hello"))
    with pytest.raises(ConfigError, match=r"corpus.1: holds a tar, which its name does not say; .*format tar"):
        texts_in(tmp_path / "corpus.1")
    assert texts_in(tmp_path / "corpus.1", format="tar") == ["hello"]


@pytest.mark.parametrize("name", ["corpus.json", "corpus.JSON", "corpus.json.gz", "corpus.jsonlines"])
def test_json_lines_under_another_name_are_read_as_such(tmp_path, name) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINE * 3) if name.endswith("gz") else LINE * 3)
    assert texts_in(path) == ["hello hello hello"] * 3


@pytest.mark.parametrize("text", ['["a"]', '[\n {"text": "a"}\n]', '{\n "text": "a"\n}'])
def test_json_that_is_no_lines_is_refused(tmp_path, text) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=r"a.json:1: (is not valid JSON: .*jq -c|is not a JSON object)"):
        texts_in(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["corpus", "part-00000", "corpus.jsonl.1", "corpus.txt"])
@pytest.mark.parametrize("data", [LINE, LINE * 2, b"\xef\xbb\xbf" + LINE, b"\n" + LINE])
def test_json_lines_never_become_one_text(tmp_path, capsys, name, data) -> None:
    (tmp_path / name).write_bytes(data)
    arguments = ("encode", tmp_path / name, "--tokenizer", "byte", "--out", tmp_path / "set")
    assert call(*arguments) == 2
    assert f"{name}: holds JSON lines, which its name does not say; name its format (--format jsonl)" in (
        capsys.readouterr().err
    )
    assert texts_in(tmp_path / name, format="jsonl") == ["hello hello hello"] * data.count(LINE)
    assert texts_in(tmp_path / name, format="text") == [data.decode().removeprefix("\ufeff")]


def test_texts_that_only_look_like_json_lines_are_texts(tmp_path) -> None:
    found = ['{"text": 5}\n', '{"title": "x"}\n', "{ x }", '{"text": "a"}\nand so on', "ustar"]
    for number, text in enumerate(found):
        (tmp_path / f"{number}.txt").write_text(text)
    assert texts_in(tmp_path) == found


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.ZIP", "a.csv.gz", "a.feather", "a.lz4"])
def test_other_formats_are_not_read_as_text(tmp_path, name) -> None:
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(ConfigError, match="can't read this format; name it with format"):
        texts_in(tmp_path / name)
    if not name.endswith(".gz"):
        assert texts_in(tmp_path / name, format="text") == ["a,b\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "txt.tar", "json.tar"])
def test_a_byte_order_mark_is_dropped(tmp_path, name) -> None:
    mark, line = b"\xef\xbb\xbf", b'{"text": "one"}\n'
    data = mark + (b"one" if "txt" in name else line)
    if name.endswith("tar"):
        data = tar_of(f"0.{name.removesuffix('.tar')}", data)
    elif "jsonl" in name:
        data += mark + line + mark  # files that were put together
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts_in(tmp_path / name) == ["one"] * (2 if "jsonl" in name else 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_of_16_bits_is_refused_by_its_encoding(tmp_path, encoding, name) -> None:
    (tmp_path / name).write_bytes('{"text": "one"}\n{"text": "two"}\n'.encode(encoding))
    shown = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}.get(encoding, encoding.upper())
    with pytest.raises(ConfigError, match=rf"a\.\w+(:1)?: is {shown}, not UTF-8; re-encode it \(iconv -f {shown}"):
        texts_in(tmp_path / name)


def test_a_name_that_is_not_utf8_goes_through_every_command(tmp_path, capsys) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl"))
    path.write_bytes(b'{"text": "hello there"}\n' * 3)
    for source, name, out in ((path, "caf\\udce9.jsonl", "a"), (folder, "caf\\udce9", "b")):
        assert call("encode", source, "--tokenizer", "byte", "--out", tmp_path / out) == 0
        assert [each.name for each in read_manifest(tmp_path / out).sources] == [name]
        assert call("verify", tmp_path / out) == 0 and call("inspect", tmp_path / out, "--document", 0) == 0
        assert call("fertility", source, "--tokenizer", "byte") == 0
        assert call("clean", source, "--out", tmp_path / f"{out}-clean", "--dedup") == 0
        assert call("encode", tmp_path / f"{out}-clean", "--tokenizer", "byte", "--out", tmp_path / f"{out}2") == 0
    assert call("encode", path, tmp_path / "none.txt", "--tokenizer", "byte", "--out", tmp_path / "c") == 2
    assert call("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "ab") == 0
    assert capsys.readouterr().err.count("error: ") == 1


# ---------------------------------------------------------------------------------------------------- folders


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
