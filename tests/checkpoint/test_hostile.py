"""Checkpoints that somebody else prepared: refused in one line, without waiting, and within bounds."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infini_train.checkpoint.damage import find_damage
from infini_train.checkpoint.fragments import CheckpointError, whole_fragment
from infini_train.checkpoint.index import dump_index, parse_index
from infini_train.checkpoint.reader import MAX_INDEX_BYTES, open_checkpoint
from infini_train.checkpoint.store import find_latest, save

LATEST: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "large": lambda path: path.write_bytes(b"step-00000001" + b"\n" * 10_000),
    "no text": lambda path: path.write_bytes(b"\xff\0"),
    "a path": lambda path: path.write_text("../../etc\n"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path, 1, [whole_fragment("w", "weight", torch.arange(6.0))], {"seen": 5}, {})


@pytest.mark.parametrize("kind", LATEST)
def test_a_pointer_that_is_none_is_passed_over(folder: Path, kind: str) -> None:
    (folder.parent / "latest").unlink()
    LATEST[kind](folder.parent / "latest")
    checkpoint = find_latest(folder.parent.parent, pytest.fail)
    assert checkpoint is not None and checkpoint.path == folder


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_INDEX_BYTES + 1)


INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, r"index\.json can't be read \(is a named pipe, not a file\)$"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), r"index\.json can't be read \(is a device, not a file\)$"),
    "a folder": (Path.mkdir, r"index\.json can't be read \(is a folder, not a file\)$"),
    "large": (sparse, r"index\.json can't be read \(holds more than 134,217,728 bytes"),
    "deep lists": (lambda path: path.write_text("[" * 200_000), r"index\.json is torn or corrupt \("),
    "deep objects": (
        lambda path: path.write_text('{"format_version": 1, "state": ' + '{"a":' * 100_000 + "1" + "}" * 100_001),
        r"index\.json is torn or corrupt \(",
    ),
    "a foreign key": (
        lambda path: path.write_text('{"format_version": 1, "x": [' + "1," * 100_000 + "1]}"),
        r"index\.json is corrupt \(x: unknown key\)$",
    ),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_is_none(folder: Path, kind: str) -> None:
    make, problem = INDEXES[kind]
    (folder / "index.json").unlink()
    make(folder / "index.json")
    with pytest.raises(CheckpointError, match=rf"^{folder}: {problem}") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 300
    assert len(find_damage(folder)) == 1


def forge(folder: Path, change: Callable[[dict], object]) -> None:
    """An index with a right checksum."""
    index = parse_index((folder / "index.json").read_text())
    change(vars(index))
    (folder / "index.json").write_text(dump_index(index))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"numel": -1}, "too long"),
        ({"numel": 7}, "too long"),
        ({"start": (0, 0)}, "ranks differ"),
        ({"start": (-1,)}, "slice too large"),
        ({"global_shape": (2**40,), "shape": (2**40,), "numel": 2**40}, "has no room for what it should hold"),
        ({"file": "../other.safetensors"}, "names the unknown file"),
    ],
)
def test_places_that_can_not_be(folder: Path, entry: dict, problem: str) -> None:
    forge(folder, lambda index: vars(index["fragments"][0]).update(entry))
    with pytest.raises(CheckpointError, match=rf"^{folder}: index\.json is corrupt \([^\n]*{problem}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("config", [{"model": []}, {"model": {"attention": "infini"}}])
def test_a_config_that_is_none(folder: Path, config: dict) -> None:
    forge(folder, lambda index: index.update(config=config))
    with pytest.raises(CheckpointError, match=r"config\.model is not a model"):
        open_checkpoint(folder)


def test_a_file_of_tensors_that_is_a_pipe(folder: Path) -> None:
    (folder / "rank-00000.safetensors").unlink()
    os.mkfifo(folder / "rank-00000.safetensors")
    problem = "rank-00000.safetensors can't be read (is a named pipe, not a file)"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(caught.value) == f"{folder}: {problem}" and find_damage(folder) == [problem]


def test_a_tensor_of_another_shape_than_the_index_says(folder: Path) -> None:
    content = bytearray((folder / "rank-00000.safetensors").read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["weight/w"]["shape"] = [2, 3]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    (folder / "rank-00000.safetensors").write_bytes(content[:8] + text + content[8 + size :])
    checkpoint = open_checkpoint(folder, verify=False)
    with pytest.raises(CheckpointError, match="weight/w is not what the index says"):
        list(checkpoint.read([checkpoint.whole("w", "weight")]))
