"""What the device shim decides without a GPU."""

import pytest

from infini_train.config.errors import ConfigError
from infini_train.parallel.device import check_count


def test_more_ranks_than_gpus_are_refused():
    check_count(4, 4)
    check_count(1, 8)
    with pytest.raises(ConfigError, match="--nproc: 8 processes need as many GPUs, and this machine shows 4; start 4"):
        check_count(8, 4)
