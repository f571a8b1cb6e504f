"""`python -m infini_train.resilience.preflight RUN_DIR`: node health check, run by all ranks before a large job.

Each rank checks its node and its device, so that the 8 ranks of a node run `check_node` 8 times at once: a check must
not disturb its neighbours. The ranks report to rank 0 through torch's store, and rank 0 compares (`judge`). Then one
process group checks an all-reduce and measures its bandwidth. Exit codes: 0, all nodes are healthy; 3, this rank's node
is at fault (the batch script excludes it from the next start); 2, all nodes have one fault, so none of them is the
cause (the image, the driver, a full disk that they share), and none is excluded; 1, a fault that could not be
attributed to a node.

A new threshold touches four places: its option here (`_parse`) and the check that reads it, the field of the cluster's
config (launch/cluster.py), the line that passes it on (slurm/templates/train.sbatch.j2), and docs/slurm.md.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from infini_train import exit_codes
from infini_train.command_line import path
from infini_train.config.errors import ConfigError
from infini_train.environment import read_number
from infini_train.parallel import device

ABSENCE = device.find_absence()  # a finding here, which would end any other command
device.prepare("auto" if ABSENCE is None else "cpu")  # before megatron-core is imported: no console for its notices
from infini_train.parallel import meeting, mesh  # noqa: E402

LIBRARIES = ("infini-train", "torch", "megatron-core", "deepspeed", "numpy")
MAX_CLOCK_SKEW_S = 5.0
SHARED_FILE_S = 20.0  # for a new file to appear on all nodes of a shared file system
MIN_FREE_SCRATCH_GIB = 1.0
REPEATS = 4
NO_GPU = "0 GPUs are seen"
DEVICE = "its device can't be used"
PLACE = "no device is its own"
SHARING = "ranks would use one GPU"
ALL = "all"  # in a verdict, in the place of a rank


class Facts(NamedTuple):
    """What a rank reports about its node."""

    node: str
    problems: list[str]
    versions: dict[str, str]
    clock_s: float  # when rank 0 gave the start
    gpu: str = ""  # what tells its GPU from others; empty: none


def main(arguments: Sequence[str] | None = None) -> None:
    """All ranks call it; rank 0 prints the result."""
    options = _parse(arguments)
    try:
        rank, size = mesh.world()
        mesh.complete_environment()
    except ConfigError as error:
        sys.exit(_fail(f"preflight: {error}", exit_codes.MISTAKE))
    problems = check_node(options.run_dir, options.gpus, options.min_free_gib)
    try:
        verdict, bandwidth = compare_ranks(options.run_dir, problems, options.timeout_s)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        sys.exit(_fail(f"preflight: rank {rank} ({node_name()}): {problem}", exit_codes.FAILED))
    if ALL in verdict:
        sys.exit(_fail(f"preflight: {verdict[ALL]}", exit_codes.MISTAKE))
    if rank == 0:
        for line in verdict.values():
            print(f"error: preflight: {line}", file=sys.stderr)
        if not verdict:
            print(f"preflight: {size} ranks are well; all-reduce {bandwidth / 1e9:.3g} GB/s a rank (bus bandwidth)")
    if str(rank) in verdict:
        sys.exit(exit_codes.BAD_NODE if rank == 0 else _fail(f"preflight: {verdict[str(rank)]}", exit_codes.BAD_NODE))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preflight", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="folder of the run, on the shared file system")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs that each node should have")
    parser.add_argument("--min-free-gib", type=float, default=1.0, metavar="N", help="space for the run")
    parser.add_argument("--timeout-s", type=float, default=180.0, metavar="N", help="how long to wait for a rank")
    return parser.parse_args(arguments)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def node_name() -> str:
    """The node's name in Slurm, or its host name."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


# ------------------------------------------------------------------------------------------------------------ one node


def check_node(run_dir: Path, gpus: int, min_free_gib: float) -> list[str]:
    """What is wrong with this node, as far as it can find out alone."""
    problems = check_count(gpus)
    for name, folder, gib in (("run_dir", run_dir, min_free_gib), ("TMPDIR", None, MIN_FREE_SCRATCH_GIB)):
        try:
            folder = Path(os.environ.get("TMPDIR", tempfile.gettempdir())) if folder is None else folder
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
            free_gib = shutil.disk_usage(folder).free / 2**30
        except OSError as error:
            problems.append(f"{name}: {folder} can't be written: {error.strerror}")
            continue
        if free_gib < gib:
            problems.append(f"{name}: {free_gib:.1f} GiB are free on {folder}, less than {gib:g}")
    return [*problems, *check_device()]


def check_count(gpus: int) -> list[str]:
    """Whether this rank sees the node's GPUs; or its own alone, where the job shows each task no more."""
    found = device.count()
    expected = 1 if gpus and device.is_shown_one() else gpus
    if found == expected:
        return []
    if found == 0 and ABSENCE is not None:
        return [f"{NO_GPU}, not {expected}: {ABSENCE.reason}"]
    return [f"{found} GPUs are seen, not {expected}"]


def check_device() -> list[str]:
    """Whether this rank's device computes a matrix product correctly."""
    try:
        device.set_current()
        ones = torch.ones(256, 256, device=device.current())
        wrong = int((ones @ ones != 256).sum())
    except ConfigError as error:
        return [f"{PLACE}: {error}"]
    except RuntimeError as error:
        return [f"{DEVICE}: {' '.join(str(error).split())[:200]}"]
    return [f"its device multiplies wrongly ({wrong} of 65536 numbers)"] if wrong else []


def find_facts(problems: list[str]) -> Facts:
    """What this rank reports: its problems; versions that have to be the same on all ranks, by name; its GPU."""
    is_usable = not any(text.startswith((DEVICE, PLACE)) for text in problems)
    versions = {"python": sys.version.split()[0], "device": device.describe() if is_usable else "none"}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return Facts(node_name(), problems, versions, time.time(), device.identify() if is_usable else "")


# ----------------------------------------------------------------------------------------------------------- all nodes


def compare_ranks(run_dir: Path, problems: list[str], timeout_s: float) -> tuple[dict[str, str], float]:
    """Compares all ranks.

    Returns:
        What is wrong, by rank; and the bus bandwidth of an all-reduce in bytes/s (0 if something is wrong).

    Raises:
        RuntimeError: a rank did not answer, or the collective failed.
    """
    rank, size = mesh.world()
    if size == 1:
        return judge([find_facts(problems)]), 0.0
    store = meeting.SignedStore(meeting.open_store(timeout_s))
    token = run_dir / f".preflight-{os.environ.get('INFINI_TRAIN_START', os.environ.get('MASTER_PORT', ''))}"
    if rank == 0:
        with contextlib.suppress(OSError):  # check_node has reported it
            token.write_text("here", encoding="utf-8")
        store.set("go", "")
    store.wait_for("go", timeout_s)
    clock_s = time.time()
    if not problems and not _appears(token):
        problems = [f"run_dir: {run_dir} is not the same folder as on rank 0's node; it must be a shared file system"]
    store.set(f"facts/{rank}", json.dumps(find_facts(problems)._replace(clock_s=clock_s)))
    if rank == 0:
        store.set("verdict", json.dumps(judge(_collect(store, size, timeout_s))))
        token.unlink(missing_ok=True)
    verdict = json.loads(store.wait_for("verdict", timeout_s))
    bandwidth = 0.0 if verdict else measure_all_reduce(timeout_s)
    store.set(f"done/{rank}", "")
    for other in range(size) if rank == 0 else ():  # the store ends with this process
        store.wait_for(f"done/{other}", timeout_s)
    return verdict, bandwidth


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_FILE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _collect(store: meeting.SignedStore, size: int, timeout_s: float) -> list[Facts]:
    deadline = time.monotonic() + timeout_s
    found: dict[int, str] = {}
    while missing := [rank for rank in range(size) if rank not in found]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {', '.join(map(str, missing))} did not answer within {timeout_s:g} s")
        found |= {rank: text for rank in missing if (text := store.read(f"facts/{rank}")[0]) is not None}
        time.sleep(0.2)
    return [Facts(*json.loads(found[rank])) for rank in range(size)]


def judge(facts: Sequence[Facts]) -> dict[str, str]:
    """Problems by rank: its own findings, and where it differs from the others.

    A problem that all nodes have is no node's fault; then everything is told under `ALL`.
    """
    found = [each._replace(problems=[*each.problems, *_compare(each, facts)]) for each in facts]
    shared = find_shared(found)
    own = {
        str(rank): f"rank {rank} ({each.node}): {'; '.join(rest)}"
        for rank, each in enumerate(found)
        if (rest := [text for text in each.problems if _form(text) not in shared])
    }
    if not shared:
        return own
    nodes = len({each.node for each in found})
    whose = f"all {nodes} nodes have" if nodes > 1 else f"the only node ({found[0].node}) has"
    told = "; ".join(shared.values())
    besides = f"; besides, {'; '.join(own.values())}" if own else ""
    return {
        ALL: f"{whose} this problem: {told}; so the cause is taken to be the image, the driver, the cluster's config or"
        f" a file system, no node is left out, and another start would find the same{besides}"
    }


def _form(problem: str) -> str:
    """The same for problems that differ in sizes and times alone, as in 3.2 GiB."""
    return re.sub(r"\d+\.\d+", "", problem)


def _compare(one: Facts, facts: Sequence[Facts]) -> list[str]:
    """A version that differs from most others', a clock that is off, a GPU that another rank has too."""
    problems = []
    off_s = one.clock_s - statistics.median(each.clock_s for each in facts)
    if abs(off_s) > MAX_CLOCK_SKEW_S:
        problems.append(f"its clock is off by {off_s:+.0f} s")
    for name in sorted({name for each in facts for name in each.versions}):
        usual = Counter(each.versions.get(name) for each in facts).most_common(1)[0][0]
        if one.versions.get(name) != usual:
            problems.append(f"{name} {one.versions.get(name)}, the others have {usual}")
    sharing = sum(bool(one.gpu) and (each.node, each.gpu) == (one.node, one.gpu) for each in facts)
    if sharing > 1:
        problems.append(f"{sharing} {SHARING}, which NCCL refuses")
    return problems


def find_shared(facts: Sequence[Facts]) -> dict[str, str]:
    """Problems that another node would have too, by their form: no node is at fault. Empty if there are none.

    Of several nodes: those that all have, and if they are of a device, on all ranks; scratch folders belong to their
    nodes. One node alone can't be compared: those that are of no device, and at a job's first start that no GPU is
    seen, since nothing speaks for the image then.
    """
    ranks = [{_form(text) for text in each.problems} for each in facts]
    texts = {_form(text): text for each in reversed(facts) for text in each.problems}  # as the first of them tells it
    nodes = {each.node for each in facts}
    if len(nodes) == 1:
        is_first = read_number("SLURM_RESTART_COUNT", 0) == 0
        begins = (PLACE, NO_GPU) if is_first else (PLACE,)
        return {form: text for form, text in texts.items() if text.startswith(begins) or SHARING in text}

    def is_shared(form: str) -> bool:
        if form.startswith(DEVICE):
            return all(form in problems for problems in ranks)
        having = {each.node for each, problems in zip(facts, ranks, strict=True) if form in problems}
        return having == nodes and not form.startswith("TMPDIR")

    return {form: text for form, text in texts.items() if is_shared(form)}


def measure_all_reduce(timeout_s: float) -> float:
    """Checks a sum over all ranks and returns its bus bandwidth in bytes/s: 2 (n - 1) / n of the bytes over the time.

    Raises:
        RuntimeError: the sum is wrong, or a rank does not take part.
    """
    rank, size = mesh.world()
    mesh.connect(timeout_s / 2)
    elements = 2**26 if device.count() else 2**18
    values = torch.empty(elements, device=device.current())
    best_s = float("inf")
    for _ in range(REPEATS):
        values.fill_(rank + 1)
        device.synchronise()
        start = time.perf_counter()
        dist.all_reduce(values)
        device.synchronise()
        best_s = min(best_s, time.perf_counter() - start)
    wrong = int((values != size * (size + 1) / 2).sum())
    mesh.stop()
    if wrong:
        raise RuntimeError(f"an all-reduce over {size} ranks gave {wrong} wrong numbers")
    return 2 * (size - 1) / size * values.nbytes / best_s


if __name__ == "__main__":
    main()
