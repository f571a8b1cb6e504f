"""A folder in Hugging Face's layout: config.json, and weights in one safetensors file or in several with an index."""

import contextlib
import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infini_train.atomic_files import sync_path
from infini_train.checkpoint.sync import appearing, write_synced
from infini_train.config.errors import ConfigError
from infini_train.data.model_files import read_json
from infini_train.regular_files import require_regular

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_FILE_BYTES = 2 * 10**9  # twice as much is in memory while a file is written
_OPEN_FILES = 64  # far below the usual limit of 1024 descriptors


class WeightsFolder:
    """The weights of a folder, read one at a time; the files are mapped, so only what is read comes into memory.

    Args:
        folder: in Hugging Face's layout.

    Attributes:
        files: the file of each tensor.

    Raises:
        ConfigError: there are no safetensors files, or one is missing or torn.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = lru_cache(_OPEN_FILES)(self._open_file)
        if (folder / WEIGHTS).exists():  # transformers, too, takes it where an index lies beside it
            self.files = dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)
        elif (folder / INDEX).exists():
            self.files = self._read_index()
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            why = f"only {pickled[0]}, which is pickled and never read; " if pickled else ""
            raise ConfigError(f"{folder}: holds no {WEIGHTS}, {why}save the model as safetensors")

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ConfigError(f"{path}: weight_map must name the file of each tensor")
        for file in dict.fromkeys(files.values()):
            if Path(file).name != file:
                raise ConfigError(f"{path}: {file} is no file of this folder")
            there = set(self._open(file).keys())
            lacking = [name for name, own in files.items() if own == file and name not in there]
            if lacking:
                raise ConfigError(f"{self.folder / file}: {lacking[0]} is missing; copy the file again")
        return files

    def _open_file(self, file: str) -> Any:
        path = self.folder / file
        try:
            require_regular(path)  # a named pipe would make safetensors wait
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: is missing; copy it again") from error
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: is torn, or no safetensors file ({error}); copy it again") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is there."""
        return tuple(self._open(self.files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that is there.

        Raises:
            ConfigError: not fp32, bf16 or fp16.
        """
        found = self._open(self.files[name]).get_slice(name).get_dtype()
        if found not in DTYPES:
            raise ConfigError(f"{self.folder}: {name} is stored as {found}; take the model in bf16, fp16 or fp32")
        return DTYPES[found]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, as it is stored, on the CPU.

        Raises:
            ConfigError: it holds NaN or infinity.
        """
        return require_finite(self._open(self.files[name]).get_tensor(name), f"{self.folder}: {name}")


def require_finite(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The weight itself.

    Raises:
        ConfigError: it holds NaN or infinity; the message begins with `name`.
    """
    if not torch.isfinite(weight).all():
        raise ConfigError(f"{name} holds NaN or infinity, so its output would be NaN; use an undamaged checkpoint")
    return weight


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    sizes_bytes: Mapping[str, int],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes weights as one file, or as several of about `max_file_bytes` with their index; holds one in memory.

    Args:
        folder: is there, and has no weights yet.
        weights: names and tensors on the CPU, in the order of `sizes_bytes`.
        sizes_bytes: of all of them, since a file's name says how many there are.
        max_file_bytes: a larger tensor has a file of its own.
    """
    groups = _group(sizes_bytes, max_file_bytes)
    files: dict[str, str] = {}
    stream = iter(weights)
    for number, names in enumerate(groups, 1):
        file = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in islice(stream, len(names))}
        assert list(tensors) == names
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # safetensors makes the file private to the user; give it what the umask gave the folder
        (folder / file).chmod(stat.S_IMODE(folder.stat().st_mode) & 0o666)
        sync_path(folder / file)
        files |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes_bytes.values())}, "weight_map": files}
        write_synced(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _group(sizes_bytes: Mapping[str, int], max_file_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes_bytes.items():
        if groups[-1] and filled + size > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def name_dtype(dtype: torch.dtype) -> str:
    """As config.json has it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


def size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor on disk."""
    return math.prod(shape) * dtype.itemsize


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes the target's name when all is in it, and vanishes if anything fails.

    Raises:
        ConfigError: the target can't be written.
    """
    try:
        with appearing(target, "tmp-convert") as aside:
            yield aside
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{target}: can't be written: {error}") from error
