"""benchmarks/gpu_check.py, rehearsed on the CPU: it must not be tried for the first time on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--rehearse", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]


def of_kind(rows: list[dict], what: str) -> list[dict]:
    return [row for row in rows if row["what"] == what]


def test_every_section_ends_right(rows) -> None:
    assert len(of_kind(rows, "section")) == 6 and all(row["right"] for row in of_kind(rows, "section"))


def test_what_a_gpu_will_be_judged_by_is_there(rows) -> None:
    for row in of_kind(rows, "form"):
        assert row["gradients"] > 0 or row["precision"] == "fp32"
    for row in of_kind(rows, "train"):
        assert row["tokens_per_s"] > 0 and row["peak_memory_bytes"] > 0 and row["planned"]["tokens_s"] > 0
    (stream,) = of_kind(rows, "stream")
    assert stream["results"][0]["exact"] == stream["results"][0]["samples"]


def test_the_page_can_be_made_of_them(rows, monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report

    for name in gpu_report.SECTIONS:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(gpu_report, "FOLDER", tmp_path)
    for block in gpu_report.PAGE.blocks.values():
        assert block() != gpu_report.NOT_RUN


def test_without_a_gpu_nothing_is_checked(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    import gpu_check

    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="error: no GPU can be checked: .*--rehearse"):
        gpu_check.main()
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_or_hangs_is_told(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    monkeypatch.setattr(gpu_check, "SECTIONS", {**gpu_check.SECTIONS, "stream": 0.05, "kernels": 0.05})
    arguments = ["--rehearse", str(tmp_path), "--only", "stream", "kernels"]
    monkeypatch.setattr("sys.argv", ["gpu_check.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1 and "wrong or failed: stream, kernels" in capsys.readouterr().out
    assert gpu_check.read_rows(tmp_path, "stream")[-1]["exit_code"] is None
