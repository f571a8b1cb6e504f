"""The benchmark of a long stream, over a few thousand tokens: nothing overflows, fp32 stays at rounding of float64."""

import runpy
from pathlib import Path

import pytest
import torch

from infini_train.ops import gated_reference

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # it imports its neighbours, as when it is run
        return runpy.run_path(str(BENCHMARKS / "stability.py"))


def test_no_stream_overflows_or_drifts(program):
    for stream in program["STREAMS"]:
        places = program["measure"](stream, (1024, 3072))["places"]
        assert [place["tokens"] for place in places] == [1024, 3072]
        for place in places:
            assert place["not_finite"] == 0 and 0 < place["norm"] < 100, stream.title
            assert 0 < place["relative_error"] < 1e-4, stream.title


def test_the_stream_in_float64_is_that_of_plain_loops(program):
    stream = program["STREAMS"][0]
    tokens = stream.draw(torch.Generator().manual_seed(0), 0)
    found = program["write"](tokens, program["empty"](torch.float64), torch.float64).memory_BKDE[0, 1]
    k_TD, v_TE = tokens.k_BKTD[0, 1].double(), tokens.v_BKTE[0, 1].double()
    strength_T, decay_T = (x[0, 1].double().exp() for x in tokens.writing)
    memory_DE = torch.zeros_like(found)
    for k_D, v_E, kept, decay in zip(k_TD, v_TE, strength_T, decay_T, strict=True):
        memory_DE = gated_reference.write(memory_DE, k_D, v_E, 1 - kept, decay, torch.ones(()).double())
    torch.testing.assert_close(found, memory_DE, rtol=1e-10, atol=1e-10)


def test_numbers_that_are_none_are_counted(program):
    exact = program["empty"](torch.float64)
    broken = program["empty"](torch.float32)
    broken.memory_BKDE[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, 1.0])
    assert program["compare"](broken, exact)["not_finite"] == 2
