"""One rank's files."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from infini_train.checkpoint.fragments import CheckpointError, Fragment, whole_fragment
from infini_train.checkpoint.index import parse_part
from infini_train.checkpoint.writer import part_file, write_part


def test_tensors_are_spread_over_files_of_the_given_size(tmp_path: Path) -> None:
    fragments = [whole_fragment(f"layers.{i}.w", "weight", torch.full((10,), float(i))) for i in range(5)]
    fragments.append(whole_fragment("large", "weight", torch.zeros(100)))
    write_part(tmp_path, fragments, "a", 3, max_file_bytes=80)
    part = parse_part(part_file(tmp_path, 3).read_text())
    names = ["rank-00003.safetensors", *(f"rank-00003.{i:04d}.safetensors" for i in (1, 2, 3))]
    assert [file.file for file in part.files] == names
    assert [entry.file for entry in part.fragments] == [names[i] for i in (0, 0, 1, 1, 2, 3)]
    for entry, fragment in zip(part.fragments, fragments, strict=True):
        with safe_open(tmp_path / entry.file, framework="pt") as file:
            assert torch.equal(file.get_tensor(entry.key), fragment.tensor)


def test_whole_tensors_keep_their_name_and_parts_say_where_they_lie(tmp_path: Path) -> None:
    whole = whole_fragment("w", "weight", torch.zeros(2, 3))
    parts = [Fragment("v", "weight", (4, 3), (2, 0), (2, 3), first, torch.zeros(3)) for first in (0, 3)]
    write_part(tmp_path, [whole, *parts], "a", 0)
    entries = parse_part(part_file(tmp_path, 0).read_text()).fragments
    assert [entry.key for entry in entries] == ["weight/w", "weight/v@2,0+0", "weight/v@2,0+3"]


def test_views_of_one_buffer_and_strided_views_are_written(tmp_path: Path) -> None:
    buffer = torch.arange(12.0)
    views = {"first": buffer[:6], "last": buffer[6:], "strided": buffer[::2], "again": buffer[:6]}
    write_part(tmp_path, [whole_fragment(name, "weight", view) for name, view in views.items()], "a", 0)
    with safe_open(tmp_path / "rank-00000.safetensors", framework="pt") as file:
        for name, view in views.items():
            assert torch.equal(file.get_tensor(f"weight/{name}"), view)


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "aside"
    folder.mkdir()
    folder.chmod(0o755)
    write_part(folder, [whole_fragment("w", "weight", torch.zeros(2))], "a", 0)
    assert (folder / "rank-00000.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_rank_that_owns_nothing_of_a_tensor_writes_nothing_of_it(tmp_path: Path) -> None:
    parts = [Fragment("v", "weight", (3,), (0,), (3,), 0, torch.zeros(size)) for size in (0, 3)]
    empty = whole_fragment("carry", "carry", torch.zeros(0, 4))
    write_part(tmp_path, [*parts, empty], "a", 0)
    entries = parse_part(part_file(tmp_path, 0).read_text()).fragments
    assert [(entry.name, entry.numel) for entry in entries] == [("v", 3), ("carry", 0)]


def test_the_same_piece_twice_is_refused(tmp_path: Path) -> None:
    fragment = whole_fragment("w", "weight", torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"^w \(weight\): stored twice by one rank$"):
        write_part(tmp_path, [fragment, fragment], "a", 0)
