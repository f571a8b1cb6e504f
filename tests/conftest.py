"""Settings that must hold before torch or DeepSpeed is imported, and the skip of tests that need an accelerator."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
settings.load_profile("any machine")

HAS_GPU = Path("/dev/nvidiactl").exists()  # asked without torch: many tests never import it

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in several processes; the models are tiny
os.environ.setdefault("MPLBACKEND", "Agg")
if not HAS_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would search for one, and say so


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))
