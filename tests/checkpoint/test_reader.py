"""What an opened checkpoint hands out, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infini_train.checkpoint.fragments import CheckpointError, Fragment, Wanted, whole_fragment, whole_wanted
from infini_train.checkpoint.reader import Checkpoint, open_checkpoint
from infini_train.checkpoint.store import save

WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6)


def tensors() -> list[Fragment]:
    return [
        whole_fragment("layers.0.w", "weight", WEIGHT),
        whole_fragment("layers.0.w", "exp_avg", -WEIGHT),
        whole_fragment("embedding", "weight", WEIGHT.to(torch.bfloat16) / 3),
        whole_fragment("step", "step", torch.tensor(12)),
        whole_fragment("carry/layers.0/memory", "carry", torch.zeros(2, 0, 3)),
        whole_fragment("mask", "carry", torch.tensor([True, False])),
    ]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save(tmp_path, 12, tensors(), {"seen": 5}, {"name": "run"}))


def test_everything_comes_back_bit_for_bit(checkpoint: Checkpoint) -> None:
    assert (checkpoint.step, checkpoint.state, checkpoint.config) == (12, {"seen": 5}, {"name": "run"})
    fragments = tensors()
    pieces = [checkpoint.whole(f.name, f.kind) for f in fragments]
    for fragment, (wanted, tensor) in zip(fragments, checkpoint.read(pieces), strict=True):
        assert (wanted.name, wanted.kind, wanted.global_shape) == (fragment.name, fragment.kind, fragment.global_shape)
        assert tensor.dtype == fragment.tensor.dtype
        assert torch.equal(tensor, fragment.tensor)


def test_names_are_listed_by_kind(checkpoint: Checkpoint) -> None:
    assert checkpoint.names("weight") == ("layers.0.w", "embedding")
    assert checkpoint.names("exp_avg") == ("layers.0.w",)
    assert checkpoint.names("master") == ()


def test_a_part_is_read_as_a_part(checkpoint: Checkpoint) -> None:
    column = Wanted("layers.0.w", "weight", (4, 6), (1, 2), (3, 2), 1, 4)  # a tensor-parallel slice, then a ZeRO range
    ((_, tensor),) = checkpoint.read([column])
    assert torch.equal(tensor, WEIGHT[1:4, 2:4].reshape(-1)[1:5])
    ((_, nothing),) = checkpoint.read([Wanted("layers.0.w", "weight", (4, 6), (0, 0), (4, 6), 24, 0)])
    assert nothing.numel() == 0


def test_floats_convert_when_asked_and_integers_do_not(checkpoint: Checkpoint) -> None:
    ((_, tensor),) = checkpoint.read([checkpoint.whole("embedding", "weight", torch.float32)])
    assert torch.equal(tensor, (WEIGHT.to(torch.bfloat16) / 3).float().reshape(-1))
    with pytest.raises(
        CheckpointError, match=r"step \(step\): is stored as torch.int64 and can't become torch.float32"
    ):
        checkpoint.read([checkpoint.whole("step", "step", torch.float32)])


def test_a_mismatch_is_refused_before_anything_is_read(checkpoint: Checkpoint) -> None:
    good = checkpoint.whole("embedding", "weight")
    for bad, message in (
        (whole_wanted("layers.9.w", "weight", (4, 6)), r"layers\.9\.w \(weight\): is not in the checkpoint"),
        (whole_wanted("layers.0.w", "master", (4, 6)), r"layers\.0\.w \(master\): is not in the checkpoint"),
        (whole_wanted("layers.0.w", "weight", (6, 4)), r"has shape \[4, 6\] in the checkpoint and \[6, 4\] here"),
    ):
        with pytest.raises(CheckpointError, match=rf"^{checkpoint.path}: .*{message}"):
            checkpoint.read([good, bad])  # the call itself: no iteration needed
    with pytest.raises(CheckpointError, match=r"gate \(weight\): is not in the checkpoint"):
        checkpoint.whole("gate", "weight")


def test_a_file_that_vanishes_while_reading_is_named(checkpoint: Checkpoint) -> None:
    (checkpoint.path / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is missing or corrupt"):
        next(checkpoint.read([checkpoint.whole("embedding", "weight")]))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json"])
def test_any_flipped_bit_is_found(checkpoint: Checkpoint, file: str) -> None:
    path = checkpoint.path / file
    size_bytes = path.stat().st_size
    for position in range(0, size_bytes, 7):
        flip(path, position)
        with pytest.raises(CheckpointError, match=rf"^{checkpoint.path}: {file} "):
            open_checkpoint(checkpoint.path)
        flip(path, position)
    open_checkpoint(checkpoint.path)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def test_each_kind_of_damage_has_its_line(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    data, index = path / "rank-00000.safetensors", path / "index.json"
    content, text = data.read_bytes(), index.read_text()

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path, verify=False)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
        data.write_bytes(content)
        index.write_text(text)

    data.write_bytes(content[:-1])
    refused(rf"rank-00000\.safetensors is torn \({len(content) - 1} bytes instead of {len(content)}\)$")
    data.unlink()
    refused(r"rank-00000\.safetensors is missing$")
    index.unlink()
    refused(r"index\.json is missing$")
    index.write_text(text[: len(text) // 2])
    refused(r"index\.json is torn or corrupt \(not valid JSON\)$")
    index.write_bytes(b"\xff" + text.encode())
    refused(r"index\.json is torn or corrupt \(not UTF-8\)$")
    index.write_text("[]")
    refused(r"index\.json is not a checkpoint's index$")
    edit(index, lambda body: body.update(format_version=2))
    refused(r"index\.json has format version 2; this program reads 1")
    edit(index, lambda body: body.update(step=13))
    refused(r"index\.json is corrupt \(its checksum differs\)$")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such checkpoint folder$"):
        open_checkpoint(tmp_path / "nowhere")
