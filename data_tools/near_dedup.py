"""Near duplicates of a corpus that outgrows one machine: the MinHash blocks of datatrove, on its executors.

Four jobs of many tasks: signatures of all documents, documents that share a band of them, clusters of those, and the
texts without all but one of each cluster. Reading, signatures and writing are those of `clean --near-dedup`, so a
threshold means the same; sorting, joining, clustering, retries and queues are datatrove's.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document as TroveDocument
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from loguru import logger

from data_tools.clean import Report, check_clean_target, publish, read_report, write_part
from data_tools.documents import Document
from data_tools.duplicates import SHINGLES_VERSION, NearKeys
from data_tools.job import JobOptions
from data_tools.plan import Plan, make_plan
from data_tools.problems import LeftOut, SettingError
from data_tools.progress import elapsed_time
from data_tools.readers import Reader
from data_tools.tasks import do_task
from data_tools.workplace import Workplace
from infini_train import __version__
from infini_train.command_errors import translate
from infini_train.config.errors import ConfigError
from infini_train.data.writer import explain_disk_errors
from infini_train.redaction import redact

_TASK_BYTES = 512_000_000
_SUBMITTED = "launch_script.slurm"  # of datatrove: from then on the work belongs to a job


def _shorten(record: Any) -> None:
    """Takes the traceback out of what is logged about a mistake of the user, or of the machine."""
    error = record["exception"]
    if error is not None and (isinstance(error.value, ConfigError) or translate(error.value) is not None):
        record["exception"] = None


logger.configure(patcher=_shorten)  # datatrove's log; here, since its worker processes import this module


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Slurm's partition and limits for the tasks."""

    partition: str
    time_limit: str = "24:00:00"
    memory_gb: int = 4
    arguments: tuple[str, ...] = ()  # of sbatch, each name=value

    def __post_init__(self) -> None:
        for value in (self.partition, self.time_limit, *self.arguments):
            if not re.fullmatch(r"[\w.,:=@/+-]+", value):  # they become lines of a batch script
                raise ConfigError(f"Slurm: {value!r} holds characters that no option of sbatch needs")
        for argument in self.arguments:
            if "=" not in argument:
                raise SettingError("{arguments}: {given} is not NAME=VALUE", given=repr(argument))


@dataclass(frozen=True, kw_only=True)
class NearDedupOptions(JobOptions):
    """How to look for near duplicates; the results depend on `read`, `threshold` and `task_bytes` alone."""

    threshold: float = 0.8  # texts with this share of common shingles are near duplicates
    task_bytes: int = _TASK_BYTES
    slurm: SlurmOptions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part is not None:
            raise SettingError("{part}: datatrove divides the tasks; leave it out")


def near_dedup(sources: Iterable[str], out: Path | str, options: NearDedupOptions) -> Report | list[str]:
    """Write the documents without near duplicates to `out`, as `clean` does.

    The next call resumes unfinished work. On Slurm the first call submits the jobs, and the next one, when they are
    done, puts their results together.

    Returns:
        The report; or the ids of the jobs that were submitted.

    Raises:
        ConfigError: `out` holds something else, the sources can't be read, a task failed, or jobs are still queued.
    """
    out, sources = Path(out), [str(source) for source in sources]
    keys = NearKeys(options.threshold)
    command = {
        **json.loads(json.dumps(vars(options.read))),
        "threshold": options.threshold,
        "task_mb": options.task_bytes / 1e6,
        "version of infini-data": __version__,
        "version of the shingles": SHINGLES_VERSION,
    }
    check_clean_target(out, options.overwrite)
    workplace = Workplace(out, restart=options.restart, finished=("completions/*", _SUBMITTED))
    with workplace as folder:
        folder = folder.absolute()  # tasks may run elsewhere
        plan = make_plan(folder, sources, command, options.task_bytes, options.read.format)
        if plan.in_process:
            raise ConfigError("standard input and named pipes can't be read by several tasks; give files")
        steps = _steps(folder, keys, options)
        tasks = {"signatures": len(plan), "buckets": keys.bands, "clusters": 1, "texts": len(plan)}
        if options.slurm is not None:
            _check_queue(folder, tasks)
        missing = _missing(folder, tasks)
        if missing and options.slurm is not None:
            return _submit(folder, steps, tasks, options.slurm)
        if missing:
            _run_here(folder, steps, tasks, options.workers)
        with workplace.last_step() as is_mine, explain_disk_errors(out), elapsed_time("collect the parts"):
            if is_mine:
                publish(
                    workplace,
                    len(plan),
                    options.new_left_out(),
                    {"sources": [redact(each) for each in sources], "command": command},
                )
    return read_report(out)


def _steps(folder: Path, keys: NearKeys, options: NearDedupOptions) -> dict[str, list[PipelineStep]]:
    """The pipeline of each job."""
    config = MinhashConfig(
        num_buckets=keys.bands, hashes_per_bucket=keys.rows, hash_config=HashConfig(precision=32, hash_fc="sha1")
    )
    signatures, pairs, clusters = (str(folder / name) for name in ("signatures", "pairs", "clusters"))
    reader = CorpusReader(folder, options)
    return {
        "signatures": [CorpusReader(folder, options), Signatures(signatures, config, options.threshold)],
        "buckets": [MinhashDedupBuckets(signatures, pairs, config=config)],
        "clusters": [MinhashDedupCluster(pairs, clusters, config=config)],
        "texts": [reader, MinhashDedupFilter(clusters), PartWriter(folder, reader)],
    }


class CorpusReader(PipelineStep):  # type: ignore[misc]
    """The documents of one of the plan's tasks."""

    type, name = "READER", "infini-data"

    def __init__(self, folder: Path, options: NearDedupOptions) -> None:
        super().__init__()
        self.folder, self.options = folder, options
        self.left_out, self.documents = options.new_left_out(), 0  # of the task that is read

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        self.left_out, self.documents = self.options.new_left_out(), 0
        reader = Reader(self.options.read, self.left_out)
        for part in Plan(self.folder).ranges(rank):
            for document in reader.documents(part):
                if document.tokens is not None:
                    raise ConfigError(f"{document.id}: holds token ids, not text")
                metadata = {"source": document.source, "metadata": dict(document.metadata)}
                self.documents += 1
                yield TroveDocument(text=document.text, id=document.id, metadata=metadata)


class Signatures(MinhashDedupSignature):  # type: ignore[misc]
    """datatrove's first block with the signature of `NearKeys`, which reads a long document in slabs."""

    def __init__(self, output_folder: str, config: MinhashConfig, threshold: float) -> None:
        super().__init__(output_folder, config, language=WhitespaceTokenizer())
        self.threshold = threshold

    def get_shingles(self, text: str) -> np.ndarray:
        return NearKeys(self.threshold).signature(text)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        return [band.tolist() for band in shingles]


class PartWriter(PipelineStep):  # type: ignore[misc]
    """A task's documents, in the format of `clean`; whole or not at all."""

    type, name = "WRITER", "infini-data"

    def __init__(self, folder: Path, reader: CorpusReader) -> None:
        super().__init__()
        self.folder, self.reader = folder, reader  # of the same pipeline: knows what was read

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        left_out = LeftOut()

        def documents() -> Iterator[Document]:
            kept = 0
            for each in data:
                kept += 1
                yield Document(each.id, each.text, each.metadata["source"], each.metadata["metadata"])
            left_out.documents.update(self.reader.left_out.documents)
            left_out.places += self.reader.left_out.places
            left_out.documents["near duplicates"] += self.reader.documents - kept

        def work(task: int, place: Path, threads: int, advance: Any) -> None:
            write_part(place, documents(), self.reader.options.read.text_field, left_out, {})

        do_task(self.folder, work, rank, 1, lambda n_bytes: None)


def _missing(folder: Path, tasks: dict[str, int]) -> int:
    """Tasks of all jobs that datatrove has not marked as done."""
    done = (len(list((folder / "logs" / name / "completions").glob("*"))) for name in tasks)
    return sum(tasks.values()) - sum(done)


def _run_here(folder: Path, steps: dict[str, list[PipelineStep]], tasks: dict[str, int], workers: int) -> None:
    for name, pipeline in steps.items():
        count = min(workers, tasks[name])
        executor = LocalPipelineExecutor(
            pipeline, tasks=tasks[name], workers=count, logging_dir=str(folder / "logs" / name)
        )
        executor.run()


def _submit(
    folder: Path, steps: dict[str, list[PipelineStep]], tasks: dict[str, int], slurm: SlurmOptions
) -> list[str]:
    """The ids of the jobs."""
    before = None
    jobs = []
    for name, pipeline in steps.items():
        before = SlurmPipelineExecutor(
            pipeline,
            tasks=tasks[name],
            time=slurm.time_limit,
            partition=slurm.partition,
            mem_per_cpu_gb=slurm.memory_gb,
            job_name=_job_name(folder, name),
            qos=None,
            env_command=f"source {shlex.quote(os.path.join(sys.prefix, 'bin', 'activate'))}",
            sbatch_args=dict(argument.split("=", 1) for argument in slurm.arguments),
            depends=before,
            logging_dir=str(folder / "logs" / name),
        )
        try:
            before.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(f"Slurm: sbatch could not submit {name}: {error}") from error
        if before.job_id != -1:
            jobs.append(str(before.job_id))
    return jobs


def _job_name(folder: Path, step: str) -> str:
    """The name of a step's job: fixed for the same work, so that its jobs are found in the queue."""
    return f"near-dedup-{step}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def _check_queue(folder: Path, steps: Iterable[str]) -> None:
    """Checks that no job of this work is queued, nor one that sums up its statistics.

    Raises:
        ConfigError: some are; or Slurm does not answer.
    """
    names = ",".join(_job_name(folder, step) for step in steps)
    try:
        shown = subprocess.run(
            ["squeue", "--noheader", f"--name={names}"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"Slurm: squeue can't list what is queued: {error}") from error
    if shown.strip():
        raise ConfigError("Slurm: its jobs are queued or running; rerun the command when they have ended")
