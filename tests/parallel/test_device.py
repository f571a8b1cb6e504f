"""What the device shim decides without a GPU."""

import subprocess
import sys

import pytest
import torch

from infini_train.config.errors import ConfigError
from infini_train.parallel.device import check_count, without_compiler


def test_more_ranks_than_gpus_are_refused():
    check_count(4, 4)
    check_count(1, 8)
    with pytest.raises(ConfigError, match="--nproc: 8 processes need as many GPUs, and this machine shows 4; start 4"):
        check_count(8, 4)


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
