"""benchmarks/performance.py: its parts at tiny sizes, its page, and what it takes for a ratio."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {
    **{"linear": [1.0, 1.0, 1.0], "linear, documents": [1.1, 1.0, 1.2], "delta": [1.5, 1.4, 1.6]},
    **{"gated delta": [2.0, 2.0, 2.0], "plain loop": [1.2, 3.0, 1.4]},
}
FOUND = {
    "layers": [
        {"tokens": 2048, "segment_tokens": 512, "head_size": 64, "precision": "fp32"}
        | {"seconds": SECONDS, "product_flops": 5e9, "peak_flops": 1e10}
    ],
    "memory": [
        {"layer": "linear", "tokens": 16384, "bytes": 2**30},
        {"layer": "plain loop", "tokens": 65536, "bytes": 2**32},
    ],
    "step": {"tokens": 1024, "seconds": {"framework": [1.04, 1.03, 1.05], "bare loop": [1.0, 1.0, 1.0]}},
}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import performance_report

    return performance_report


def test_a_ratio_is_the_median_over_rounds_and_an_outlier_is_none(report):
    assert report.ratio(SECONDS, "plain loop", "linear")[0] == 1.4


def test_the_page_says_what_was_found(report):
    times, ratios = report.tabulate_times(FOUND), report.tabulate_ratios(FOUND)
    assert "| 2K | 512 | 64 | fp32 | 1,000 | 1,100 | 1,500 | 2,000 | 1,400 |  |  | 50 % |" in times
    assert "1.40 ±" in ratios and "1.50 ±" in ratios
    assert "1,024 MB, 64.0 KB a token" in report.tabulate_memory(FOUND)
    assert "1.040 ±" in report.tabulate_step(FOUND)
    assert report.draw(FOUND["layers"]).axes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_parts_run():
    command = [sys.executable, str(ROOT / "benchmarks" / "performance.py"), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("gated delta", "full attention", "bare loop", "'bytes'"))
