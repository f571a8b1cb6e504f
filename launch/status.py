"""`infini-launch status`: all runs below a folder as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import folder, ranks
from launch.slurm import EndedJob, QueuedJob

RUNNING = ("training", "starting")
UNHEARD_S = 300.0  # without a report: longer than steps and checkpoints usually take
COLUMNS = ("run", "job", "state", "step", "loss", "tok/s", "left", "restarts", "heard", "note")


def describe_runs(
    runs: list[Path], queue: Mapping[int, QueuedJob] | None, ended: Mapping[int, EndedJob] | None = None
) -> list[dict[str, Any]]:
    """A row per run, from its folder, the queue (None: unknown), and the accounting of jobs no longer in it."""
    return [describe_run(run, queue, ended or {}) for run in runs]


def describe_run(run_dir: Path, queue: Mapping[int, QueuedJob] | None, ended: Mapping[int, EndedJob]) -> dict[str, Any]:
    """A row of plain values; `state` combines what training and Slurm report."""
    status, number = folder.read_status(run_dir), None if queue is None else folder.read_job(run_dir)
    job = queue.get(number) if queue is not None and number is not None else None
    past = ended.get(number) if number is not None and job is None else None
    failure = folder.read_failure(run_dir)
    state = _state(status.get("state"), number, job, past, failure)
    trouble = ""
    if state == "training":
        entries = ranks.read_ranks(run_dir)
        trouble = ranks.describe_trouble(entries)
        if job is None:  # Slurm knows better
            state, trouble = _look_for_life(run_dir, status, entries, trouble)
    notes = [job.reason if job and job.state == "PENDING" else trouble or failure]
    if past and state != "finished":
        notes.append(past.describe())
    notes.append(status.get("problem", ""))
    return {
        "run": str(run_dir),
        "job": folder.read_job(run_dir),
        "state": state,
        "step": status.get("step"),
        "total_steps": status.get("total_steps"),
        "loss": status.get("loss"),
        "tokens_per_s": status.get("tokens_per_s"),
        "eta_s": status.get("eta_s") if state in RUNNING else None,
        "restarts": status.get("restarts"),
        "heartbeat_age_s": folder.heartbeat_age_s(status),
        "slurm": past._asdict() if past else job._asdict() if job else None,
        "note": "; ".join(note for note in notes if note),
    }


def _look_for_life(
    run_dir: Path, status: Mapping[str, Any], entries: list[ranks.Entry], trouble: str
) -> tuple[str, str]:
    """State and note of a run that says it is training, whose process may have been killed."""
    age_s = folder.heartbeat_age_s(status)
    if age_s is None or min([age_s, *(entry.age_s for entry in entries)]) <= ranks.SILENT_S:
        return "training", trouble
    alive = folder.has_process(run_dir, status)
    if alive is False:
        return "dead", "no process; start it again to resume"
    if alive is None and age_s > UNHEARD_S:
        where = f" from {status['host']}" if "host" in status else ""
        return "silent", "; ".join(filter(None, (f"no report{where} for {format_seconds(age_s)}", trouble)))
    return "training", trouble


def _state(said: str | None, number: int | None, job: QueuedJob | None, past: EndedJob | None, failure: str) -> str:
    if said == "finished":
        return said
    if job is not None:
        return said or "starting" if job.is_running else job.state.lower()
    if number is None or said not in ("training", None):
        return said or "unknown"
    if past is not None:
        return past.state.partition(" ")[0].lower()  # without "by UID"
    return "failed" if failure else "ended without a word" if said else "not in the queue"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows for a terminal."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in cells
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    step, finished = row["step"], row["state"] == "finished"
    return (
        folder.printable(row["run"], 4096),
        _text(row["job"]),
        folder.printable(row["state"], 40),
        "-" if step is None else f"{step}/{_text(row['total_steps'])}",
        "-" if row["loss"] is None else f"{row['loss']:.4f}",
        "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
        format_seconds(row["eta_s"]),
        _text(row["restarts"]),
        "-" if finished or row["heartbeat_age_s"] is None else format_seconds(row["heartbeat_age_s"]) + " ago",
        folder.printable(row["note"]),
    )


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def format_seconds(seconds: float | None) -> str:
    """As in 3d04h, 2h05m, 3m20s, 45s."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    for unit, lower, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= size:
            rest = whole % size // (size // 24 if unit == "d" else size // 60)
            return f"{whole // size}{unit}{rest:02d}{lower}"
    return f"{whole}s"
