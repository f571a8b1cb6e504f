"""What the device shim decides without a GPU."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch

from infini_train.config.errors import ConfigError
from infini_train.parallel import device
from infini_train.parallel.device import choose_index, explain_absence, find_signs, without_compiler

TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040)."


@pytest.fixture
def machine(monkeypatch):
    """Sets up what torch finds: the CUDA it was built with, signs of GPUs, and those that work."""

    def set_up(build: str | None, signs: tuple[str, ...] = (), gpus: int = 0) -> list[int]:
        def is_available() -> bool:
            if build and signs and not gpus:
                warnings.warn(TOO_OLD, stacklevel=1)
            return gpus > 0

        chosen: list[int] = []
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(device, "find_signs", lambda: list(signs))
        return chosen

    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # restored at the end, whatever the test makes of it
        monkeypatch.delenv(name)
    monkeypatch.setattr(device, "_uses_cuda", None)
    return set_up


@pytest.mark.parametrize(
    ("build", "signs", "gpus", "wanted", "expected"),
    [
        ("13.0", ("/dev/nvidia0",), 8, "auto", "cuda"),
        ("13.0", ("/dev/nvidia0",), 8, "cuda", "cuda"),
        ("13.0", ("/dev/nvidia0",), 8, "cpu", "cpu"),
        ("13.0", (), 0, "auto", "cpu"),  # a login node
        ("13.0", (), 0, "cuda", "error"),
        ("13.0", ("nvidia-smi",), 0, "auto", "error"),  # never a silent run on the CPU
        ("13.0", ("nvidia-smi",), 0, "cpu", "cpu"),
        (None, (), 0, "auto", "cpu"),
        (None, ("/dev/nvidia0",), 0, "auto", "cpu"),  # somebody installed the CPU build, and is warned
        (None, (), 0, "cuda", "error"),
    ],
)
def test_the_device_is_the_wanted_one_or_an_error(build, signs, gpus, wanted, expected, machine):
    machine(build, signs, gpus)
    if expected == "error":
        with pytest.raises(
            ConfigError, match=f"^device: {wanted}: .*; to use the CPU: --set device=cpu or --device cpu, or "
        ):
            device.choose(wanted)
        return
    device.choose(wanted)
    assert device.uses_cuda() == (expected == "cuda")
    assert (device.backend(), device.current().type) == (("nccl", "cuda") if expected == "cuda" else ("gloo", "cpu"))
    assert device.count() == (gpus if expected == "cuda" else 0)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == ("" if wanted == "cpu" else None)


def test_a_driver_that_does_not_work_is_named_with_what_it_must_be(machine):
    machine("13.0", ("/dev/nvidia0", "nvidia-smi"))
    with pytest.raises(ConfigError) as error:
        device.prepare()
    assert f"by /dev/nvidia0, nvidia-smi ({TOO_OLD}): a fault of the driver" in str(error.value)
    assert "CUDA 13.0 needs driver R580 or later" in str(error.value)
    assert "CUDA 12.6 needs driver R525 or later" in explain_absence("12.6", ["nvidia-smi"], []).reason


def test_a_build_without_cuda_is_told_where_there_is_a_gpu(machine, caplog):
    with caplog.at_level(logging.WARNING, "infini_train"):
        machine(None)
        device.choose()
        assert caplog.text == ""
        machine(None, ("/dev/nvidia0",))
        device.choose()
    assert "is a build without CUDA; for GPUs: make install CONSTRAINTS=constraints-cuda.txt; the CPU is" in caplog.text


@pytest.mark.parametrize(
    ("visible", "signs"),
    [(None, ["nvidia-smi"]), ("0,1", ["nvidia-smi", "CUDA_VISIBLE_DEVICES"]), ("", []), ("NoDevFiles", [])],
)
def test_hidden_gpus_are_no_sign_of_one(visible, signs, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [sign for sign in find_signs() if not sign.startswith("/dev/")] == signs


@pytest.mark.skipif(torch.version.cuda is not None, reason="for a build without CUDA")
@pytest.mark.parametrize("command", ["train debug --set=device=cuda", "train 8b", "eval x", "generate x", "selftest"])
def test_without_cuda_every_command_refuses_to_use_a_gpu(command, call, capsys):
    option = [] if command.startswith("train") else ["--device=cuda"]
    assert call(*command.split(), *option) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: device: cuda: torch ") and said.err.count("\n") == 1 and said.out == ""


def test_each_rank_has_a_gpu_of_its_own():
    assert choose_index(3, 4, 4) == 3
    assert choose_index(0, 1, 8) == 0
    assert choose_index(7, None, 8) == 7  # srun, all tasks see all
    assert choose_index(7, None, 1) == 0  # srun --gpus-per-task=1
    with pytest.raises(ConfigError, match="--nproc: 8 processes need as many GPUs, and this machine shows 4; start 4"):
        choose_index(0, 8, 4)
    with pytest.raises(ConfigError, match="--nproc: 2 processes need as many GPUs, and this machine shows 1; start 1"):
        choose_index(0, 2, 1)
    with pytest.raises(ConfigError, match="LOCAL_RANK: is 4, .* at least 5 processes .* sees 4 GPUs; start 4"):
        choose_index(4, None, 4)


@pytest.mark.parametrize(("local_rank", "gpus", "index"), [("3", 1, 0), ("3", 8, 3)])
def test_torch_and_deepspeed_get_the_same_index(local_rank, gpus, index, machine, monkeypatch):
    chosen = machine("13.0", ("/dev/nvidia0",), gpus)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    for _ in range(2):  # a second time, as of another layout in the same process
        device.set_current()
        assert os.environ["LOCAL_RANK"] == str(index)  # tests/parallel/test_zero.py: DeepSpeed reads this one
        assert device.current() == torch.device("cuda", index)
    assert chosen == [index, index]


def test_a_start_loads_no_compiler_and_no_pictures():
    code = (
        "import sys; from infini_train.parallel import device; device.prepare(); import infini_train.train.loop,"
        "deepspeed.runtime.zero.muon.muon_optimizer;"
        "print({'torch._inductor.compile_fx', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_compiler_is_back_behind_the_imports():
    before = torch.compile
    with pytest.raises(ZeroDivisionError), without_compiler():
        assert torch.compile(divmod) is divmod and torch.compile(dynamic=True)(divmod) is divmod
        raise ZeroDivisionError
    assert torch.compile is before
