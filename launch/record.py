"""What is recorded of a submission so that its run can be reproduced: the code's revision and the environment.

Neither may give secrets away. Of the environment only variables on a list of names are kept, and values that look
secret are masked, in uncommitted changes too. The files are written for their owner alone (launch/folder.py).
"""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from infini_train.redaction import MASK, redact, redact_variable

MAX_DIFF_CHARACTERS = 4_000_000
_KEPT = re.compile(
    r"""
    (?: SLURM | SBATCH | SRUN | INFINI_TRAIN | ENROOT | LMOD_FAMILY                         # how it was started
      | CUDA | NVIDIA | CUBLAS | CUDNN | NVTE | TORCH | PYTORCH | TRITON | DS | DEEPSPEED   # software and its settings
      | NCCL | RCCL | GLOO | UCX | FI | OFI | IBV | MLX5 | OMPI_MCA | I_MPI | HIP | ROCR | HSA
      | OMP | KMP | GOMP | MKL | OPENBLAS | NUMEXPR | MALLOC | LC )_.*
    | TORCHELASTIC_.* | PYTHON.*
    | PATH | LD_LIBRARY_PATH | LD_PRELOAD | LIBRARY_PATH | CPATH | VIRTUAL_ENV | CONDA_PREFIX | CONDA_DEFAULT_ENV
    | LOADEDMODULES | _LMFILES_ | MODULEPATH | LMOD_SYSTEM_NAME | HF_HOME | HF_HUB_OFFLINE | TOKENIZERS_PARALLELISM
    | HOME | USER | LOGNAME | HOSTNAME | SHELL | PWD | TMPDIR | LANG | LANGUAGE | TZ
    """,
    re.VERBOSE,
)


def describe_environment(variables: Mapping[str, str]) -> str:
    """The variables that say how a run was started and with which software, a line each; secrets masked."""
    kept = {name: value for name, value in variables.items() if _KEPT.fullmatch(name)}
    lines = [f"{_on_one_line(name)}={_on_one_line(redact_variable(name, kept[name]))}\n" for name in sorted(kept)]
    return "".join(lines)


def _on_one_line(text: str) -> str:
    """Line breaks, control characters and bytes that are no UTF-8 as Python's escapes."""
    return text if text.isprintable() else ascii(text)[1:-1]


def describe_revision(code: Path) -> str:
    """Commit and uncommitted changes of a checkout, secrets masked; "not a git checkout" for any other folder."""
    try:
        commit = _git(code, "rev-parse", "HEAD")
        names = _git(code, "status", "--short")
        diff = _git(code, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout\n"
    shown = redact(diff[:MAX_DIFF_CHARACTERS])
    if shown != diff[:MAX_DIFF_CHARACTERS]:
        names += f"\n(values that look secret are replaced by {MASK} below)"
    if len(diff) > MAX_DIFF_CHARACTERS:
        shown += f"\n(the rest of {len(diff):,} characters is left out)"
    return f"{commit}\n{names}\n{shown}\n"


def _git(code: Path, *arguments: str) -> str:
    """What git prints of this folder, whatever repository the environment names and whatever its config would run."""
    done = subprocess.run(
        ["git", "-C", str(code), "-c", "core.fsmonitor=false", "-c", "status.relativePaths=false", *arguments],
        env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=True,
        timeout=30,
    )
    return done.stdout.rstrip()  # a status line may begin with a blank
