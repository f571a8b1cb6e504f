"""Folders in Hugging Face's layout: one file or many, and what is torn, missing, pickled or elsewhere."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from infini_train.config.errors import ConfigError
from infini_train.convert.folder import WeightsFolder, new_folder, read_json, size_bytes, write_weights

WEIGHTS = {name: torch.full((4, size), float(size)) for name, size in (("a", 2), ("b", 3), ("c", 9), ("d", 1))}


def write(folder, limit):
    folder.mkdir()
    sizes = {name: size_bytes(tuple(tensor.shape), tensor.dtype) for name, tensor in WEIGHTS.items()}
    write_weights(folder, iter(WEIGHTS.items()), sizes, limit)
    return folder


@pytest.mark.parametrize(("limit", "files"), [(10**6, 1), (80, 3), (1, 4)])
def test_files_of_a_size_are_read_back(limit, files, tmp_path):
    folder = write(tmp_path / "hf", limit)
    assert len(list(folder.glob("*.safetensors"))) == files
    assert (folder / "model.safetensors.index.json").exists() == (files > 1)
    weights = WeightsFolder(folder)
    assert set(weights.files) == set(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert weights.shape(name) == tensor.shape and weights.dtype(name) == torch.float32
        assert torch.equal(weights.read(name), tensor)


def test_what_is_no_folder_of_weights_is_refused(tmp_path):
    folder = tmp_path / "hf"
    with pytest.raises(ConfigError, match=r"config.json: can't be read: No such file or directory; name a folder in"):
        read_json(folder / "config.json")
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"holds no model.safetensors, save the model as safetensors$"):
        WeightsFolder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ConfigError, match=r"only pytorch_model.bin, which is pickled and never read; save the model"):
        WeightsFolder(folder)
    (folder / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ConfigError, match=r"model.safetensors: is torn, or no safetensors file"):
        WeightsFolder(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config.json: is not a JSON object"):
        read_json(folder / "config.json")


def test_one_file_beside_an_index_is_taken_as_transformers_does(tmp_path):
    folder = write(tmp_path / "hf", 80)
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    assert WeightsFolder(folder).files == {"a": "model.safetensors"}


def test_an_index_that_lies_is_refused(tmp_path):
    folder = write(tmp_path / "hf", 80)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["a"]
    tensors = load_file(folder / file)
    del tensors["a"]
    save_file(tensors, folder / file)
    with pytest.raises(ConfigError, match=rf"{file}: a is missing; copy the file again"):
        WeightsFolder(folder)
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=rf"{file}: is missing; copy it again"):
        WeightsFolder(folder)
    index["weight_map"]["a"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"\.\./elsewhere.safetensors is no file of this folder"):
        WeightsFolder(folder)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as aside:
        (aside / "half").write_text("")
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as aside:
        (aside / "file").write_text("whole")
    assert [path.name for path in target.parent.iterdir()] == ["folder"] and (target / "file").is_file()
