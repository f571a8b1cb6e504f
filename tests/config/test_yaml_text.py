"""What is read as YAML and within which limits: a broken, an endless or a hostile config is one line that names it."""

import os
from pathlib import Path

import pytest

from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run, read_tree


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


BROKEN = {
    "duplicate key": ("seed: 1\nname: a\nseed: 2\n", "seed: given twice (line 3); keep one"),
    "duplicate key inside": ("train:\n  max_steps: 1\n  max_steps: 2\n", "max_steps: given twice (line 3); keep one"),
    "not YAML": ("model: [1, 2\nseed: 3\n", "not valid YAML (line 2)"),
    "a list": ("- 1\n- 2\n", "must hold a mapping of sections"),
    "empty": ("", "must hold a mapping of sections"),
    "an object": ("model: !!python/object/apply:os.getcwd []\n", "the tag !!python/object/apply:os.getcwd is not read"),
    "endless nesting": ("model: " + "[" * 5000, "nested more than 50 deep (line 1)"),
    "endless nesting of blocks": ("- " * 5000, "nested more than 50 deep (line 1)"),
    "a number without digits": ("seed: !!int ''\n", "the tag !!int is not read; write the value without it (line 1)"),
    "a tag of no value": ("seed: !!bool maybe\n", "the tag !!bool is not read"),
    "a number of no digit": ("seed: 0x_\n", "not valid YAML"),
    "an endless number": ("seed: " + "9" * 5000, "a number of 5000 characters (line 1)"),
    "an endless number in hexadecimal": ("scales: {0x" + "f" * 5000 + ": {}}\n", "a number of 5002 characters"),
    "a list as a key": ("? [a]\n: 1\n", "a key must be text or a number (line 1)"),
    "text with a NUL": ('run_dir: "a\\0b"\n', "holds the character '\\x00', which is not allowed in a config (line 1)"),
    "text that UTF-8 can't hold": ('name: "a\\ud800"\n', "holds the character '\\ud800'"),
    "an alias that contains itself": ("model: &a [*a]\n", "an alias that contains itself (line 1)"),
    "many keys": ("\n".join(f"k{i}: 1" for i in range(20_000)), "more than 20000 keys and values, which no config"),
    "a long list": ("model: [" + "1, " * 30_000 + "]", "more than 20000 keys and values"),
    "aliases of aliases": (
        "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)),
        "more than 20000 keys and values, which no config has",
    ),
    "aliases of a long text": (
        f"a: &a {'x' * 100_000}\nb: [{'*a, ' * 500}]\n",
        "more than 20000 keys and values, which no config has (line 2)",
    ),
    "a large file": ("# " + "x" * 2**20, "holds more than 1,048,576 bytes"),
    "an include that is no path": (f"include: ['{'x' * 300}.yaml']\n", "is too long: a name has at most 255 bytes"),
    "include that isn't a list": ("include: model/demo.yaml\n", "include must be a list of files"),
    "include of nothing": ("include: [model/none.yaml]\n", "include model/none.yaml: no such file"),
    "include of itself": ("include: [broken.yaml]\n", "includes itself"),
    "scales that are a list": ("scales: [32]\n", "scales must name what differs for a number of processes"),
    "a scale that is no number": ("scales: {many: {seed: 1}}\n", "scales must name what differs for a number"),
    "a scale of nothing": ("scales: {0: {seed: 1}}\n", "scales must name what differs for a number of processes"),
    "a scale without sections": ("scales: {32: 4}\n", "scales.32: must be a mapping of sections"),
    "a scale that includes": ("scales: {32: {include: [a.yaml]}}\n", "scales.32: must be a mapping of sections"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "broken.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="a.yaml: can't be read"):
        load_run(str(tmp_path / "a.yaml"))


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    tree = read_tree(
        Path(write(tmp_path / "a.yaml", "optim: &o {lr: 1, eps: 2}\nscales: {2: {optim: *o}}\nguard: *o\n"))
    )
    assert tree == {"optim": {"lr": 1, "eps": 2}, "guard": {"lr": 1, "eps": 2}}


def test_files_that_include_each_other_in_powers_of_two_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.yaml", "seed: 1\n")
    for i in range(1, 30):
        write(tmp_path / f"{i}.yaml", f"include: [{i - 1}.yaml, {i - 1}.yaml]\n")
    with pytest.raises(ConfigError, match=r"0\.yaml: too many files are included"):
        load_run(str(tmp_path / "29.yaml"))


def test_all_included_files_share_one_limit(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.yaml", f"{name}: [{'1, ' * 9000}]\n")
    write(tmp_path / "two.yaml", "include: [a.yaml, b.yaml]\n")
    assert set(read_tree(tmp_path / "two.yaml")) == {"a", "b"}
    write(tmp_path / "all.yaml", "include: [a.yaml, b.yaml, c.yaml]\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: more than 20000 keys and values"):
        read_tree(tmp_path / "all.yaml")


def test_a_pipe_is_no_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml: can't be read: is a named pipe, not a file"):
        read_tree(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"^/dev/zero: can't be read: is a device, not a file$"):
        read_tree(Path("/dev/zero"))


def test_what_is_no_regular_yaml_file_is_named_for_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("f.yaml")
    os.mkfifo("pipe")
    (tmp_path / "own").mkdir()
    for name in ("own.yaml", "own.txt"):
        (tmp_path / name).write_text("name: own\n")
    problems = {
        "f.yaml": "is a named pipe, not a file; a config must be a regular file",
        "pipe": "is a named pipe, not a file; a config must be a regular file",
        "/dev/zero": "is a device, not a file; a config must be a regular file",
        "own": "is a folder, not a file; a config must be a regular file; did you mean own.yaml?",
        "own.txt": "a config's file name must end in .yaml",
    }
    for name, problem in problems.items():
        with pytest.raises(ConfigError) as caught:
            load_run(name)
        assert str(caught.value) == f"{name}: {problem}"
    (tmp_path / "including.yml").write_text("include: [f.yaml]\n")
    with pytest.raises(ConfigError) as caught:
        load_run("including.yml")
    assert str(caught.value) == f"including.yml: include f.yaml: {problems['f.yaml']}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 5000 + ".yaml", f"{'x' * 200}...: is too long: a name has at most 255 bytes, a path 4095"),
        ("x/" * 3000, "is too long"),
        ("a\0.yaml", "holds the character '\\x00'"),
        ("", "CONFIG: must not be empty"),
        (".", ".: is a folder, not a file; a config must be a regular file"),
    ],
)
def test_what_is_no_path_of_a_config(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(name)
    assert message in str(caught.value) and len(str(caught.value)) < 500
