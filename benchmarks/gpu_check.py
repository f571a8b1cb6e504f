"""What a machine with a GPU computes, how fast, and whether as planned: `make gpu-check`, at most 15 minutes.

    python benchmarks/gpu_check.py                       # all sections, on the GPUs of this machine
    python benchmarks/gpu_check.py --only forms train    # some of them; the results of the others stay
    python benchmarks/gpu_check.py --rehearse DIR        # tiny sizes, on the CPU: the program's own test
    python benchmarks/gpu_check.py --report              # the page only, from the kept results

Each section runs in processes of its own with a time limit, so that one that hangs or crashes costs only itself:

| section | does |
|---|---|
| forms | every form of attention in a small model, fp32 and bf16 and compiled, against float64 on the CPU |
| kernels | which kernels of other packages are used here, and how long local attention takes with and without them |
| selftest | `infini-train selftest` with as many processes as there are GPUs |
| train | `infini-train train` of 125m, 350m and 1b: tokens a second, MFU, memory, beside `infini-train plan` |
| profile | the kernels of one step of 1b, slowest first |
| stream | `infini-train eval passkey` with a million tokens |

The results go to benchmarks/results/gpu/, the tables to docs/results/gpu.md. Exit code 1 if a result is wrong or a
section failed, whatever its speed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from page import RESULTS

from infini_train.child_processes import ending_with_parent

SECTIONS = {"forms": 240, "kernels": 60, "selftest": 120, "train": 270, "profile": 90, "stream": 120}  # seconds at most


def main() -> None:
    """Runs the sections one after the other, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--rehearse", type=Path, metavar="DIR", help="tiny sizes, on the CPU; the results go to DIR")
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--section", nargs=2, metavar=("NAME", "SCRATCH"), help=argparse.SUPPRESS)  # of one process
    options = parser.parse_args()
    out = options.rehearse or RESULTS / "gpu"
    if options.section:
        name, scratch = options.section
        run_section(name, out, Path(scratch), rehearsed=bool(options.rehearse))
        return
    failed: list[str] = []
    if not options.report:
        require_device(rehearsed=bool(options.rehearse))
        failed = [name for name in options.only if not supervise(name, out, rehearsed=bool(options.rehearse))]
    if not options.rehearse:
        from gpu_report import PAGE

        PAGE.write()
    if failed:
        print(f"wrong or failed: {', '.join(failed)}; see {out}")
        sys.exit(1)


def require_device(*, rehearsed: bool) -> None:
    """Ends the program where there is no GPU to check; a rehearsal is made to use none."""
    from infini_train.parallel import device

    if rehearsed:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes of the sections
    elif (absence := device.find_absence()) is not None:
        sys.exit(f"error: no GPU can be checked: {absence.reason}; --rehearse DIR tries the program on a CPU")


def supervise(name: str, out: Path, *, rehearsed: bool) -> bool:
    """Runs a section within its time; whether all of it is right. What it has found so far is kept either way.

    A section that is killed takes along what it has started: the next one needs the GPU alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.jsonl").unlink(missing_ok=True)
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "8", **os.environ}
    limit, begin = SECTIONS[name] * (10 if rehearsed else 1), time.perf_counter()
    print(f"{name} (at most {limit} s)", flush=True)
    code: int | None = None
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:  # runs, their data and checkpoints of gigabytes
        command = [sys.executable, __file__, "--section", name, scratch, *(["--rehearse", out] if rehearsed else [])]
        try:
            code = subprocess.run(
                command, timeout=limit, env=environment, check=False, preexec_fn=ending_with_parent()
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: out of time", flush=True)
    took = round(time.perf_counter() - begin, 1)
    rows = read_rows(out, name)
    right = code == 0 and bool(rows) and all(row.get("right", True) for row in rows)
    add_row(out, name, {"what": "section", "right": right, "exit_code": code, "took_s": took})
    print(f"{name}: {'right' if right else 'WRONG OR FAILED'}, {took} s", flush=True)
    return right


def run_section(name: str, out: Path, scratch: Path, *, rehearsed: bool) -> None:
    """One section; each result is written as soon as it is there."""
    import gpu_sections

    for row in getattr(gpu_sections, f"check_{name}")(scratch, rehearsed):
        add_row(out, name, row)
        print(f"  {json.dumps(row)[:400]}", flush=True)


def add_row(out: Path, name: str, row: dict[str, Any]) -> None:
    """Adds a line to the results of a section."""
    with (out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(out: Path, name: str) -> list[dict[str, Any]]:
    """The results of a section; none if it has not run."""
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
