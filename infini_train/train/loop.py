"""The training loop."""

import contextlib
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import profile

from infini_train.config.errors import ConfigError
from infini_train.config.parallel import ParallelConfig
from infini_train.config.run import RunConfig
from infini_train.data.source import Position
from infini_train.eval.perplexity import Perplexity, default_lanes, evaluate_perplexity
from infini_train.model.flops import training_flops_per_token
from infini_train.parallel import device, mesh
from infini_train.parallel.watch import OPENING, Watch
from infini_train.train.guards import DivergedError, find_bad_tensors, list_names
from infini_train.train.interrupt import Stopped, StopRequest
from infini_train.train.memory import gate_matrix, memory_figures
from infini_train.train.metrics import Metrics, format_duration, step_line, tell
from infini_train.train.optim import gate_warning, learning_rates
from infini_train.train.session import Session, hold_folder, open_session, roll_back, save_session
from infini_train.train.status import append_finding, check_fence, end_status, tell_failure, write_status
from infini_train.train.step import StepResult, train_step


def train(config: RunConfig, notify: Callable[[str], None] = tell) -> Session:
    """Trains until the budget is spent or a signal asks to stop; saves in either case. All ranks call it together.

    Raises:
        ConfigError: something about data, checkpoint or config is wrong; nothing was trained.
        DivergedError: nothing can be learned any more (`guard`); the last checkpoint stays.
        Stopped: a signal asked for it; a checkpoint of the last step is there.
    """
    first = mesh.world()[0] == 0
    notify = notify if first else ignore
    mesh.complete_environment()
    with Watch(*mesh.world(), config.parallel.timeout_s) as watch:
        watch.doing(OPENING)
        session = open_session(config, notify)
        watch.keep_diary(config.directory)
        announce(session, notify)
        with hold_folder(session), tell_failure(session), StopRequest(speaks=first) as stop:
            while run_steps(session, stop, watch):
                watch.doing(OPENING)  # reads a checkpoint, however long that takes
                roll_back(session, notify)
            end_status(session, f"stopped by {stop.agreed}")
    total = session.config.train.total_steps
    if stop.agreed and session.step < total:
        notify(f"stopped by {stop.agreed} at step {session.step} of {total}; the same command goes on from there")
        raise Stopped(stop.agreed)
    return session


def run_steps(session: Session, stop: StopRequest, watch: Watch) -> bool:
    """Step by step to the end of the budget, or to a signal; tells the watch what it is about.

    Returns:
        Whether to go on from the last checkpoint instead, because the loss has jumped.
    """
    config, total = session.config, session.config.train.total_steps
    doing = session.saver.on_wait = watch.doing

    def tell(operation: str) -> None:
        doing(f"step {session.step + 1}, {operation}")

    with Metrics(session, total) as metrics, session.saver, contextlib.closing(session.batches()) as batches:
        clock = Clock(session)
        for batch, lanes in batches if session.step < total else ():
            rates = learning_rates(session.step, total, config.optim)
            clock.start_step()
            with profiled(session):
                judge, carried = session.guard.find_problem, session.carried
                result = train_step(session.stages, session.engine, batch, carried, rates, tell, judge)
            watch.took(*clock.end_step(result))
            metrics.tick()
            end_step(session, metrics, result, lanes)
            if session.saved and session.guard.must_roll_back(result.loss, result.problem):
                return True
            stop.agree()
            last = session.step == total or stop.agreed is not None
            if not result.problem and (last or session.step % config.log.every_steps == 0):
                report_step(session, metrics, clock, result, rates)
            if not result.problem and (last or session.step % config.log.memory_every_steps == 0):
                report_memory(session, metrics, result)
            if last or config.checkpoint.is_due(session.step):
                check_fence(session)
                save_session(session, metrics.say)
            if stop.agreed is None and is_validation_due(session):
                report_validation(session, metrics, stop, doing)
            doing(f"step {session.step + 1}, waiting for data")
            clock.pause()
            if last:
                break
        else:
            if session.step < total:
                save_session(session, metrics.say)
                raise ConfigError(
                    f"data.mixture: the text ended at step {session.step} of {total}; raise the epochs of a part, or"
                    f" lower train.max_steps to {session.step}"
                )
    return False


def end_step(session: Session, metrics: Metrics, result: StepResult, lanes: Position) -> None:
    """Moves on behind a step; tells of one that was left out, or whose loss has jumped.

    Raises:
        DivergedError: too many were left out.
    """
    guard, before = session.guard, session.lanes
    finding = result.problem or guard.describe_spike(result.loss)
    session.advance(result, lanes)
    if not finding:
        return
    if session.place.is_first:
        documents = session.reader.name_documents(before)
        learned = f"left out, {guard.skipped} so far" if result.problem else "learned from all the same"
        metrics.say(f"WARNING: step {session.step}: {finding}; {learned}; documents: {list_names(documents)}")
        append_finding(session, finding, documents)
    if guard.gives_up:
        bad = find_bad_tensors(session.engine)
        if bad:
            print(f"rank {session.place.world[0]}: not finite: {list_names(bad)}", file=sys.stderr, flush=True)
        end_status(session, "diverged")
        raise DivergedError(f"{finding}; {guard.diagnose(mesh.max_over_world(float(bool(bad))) > 0)}")


def ignore(line: str) -> None:
    """What ranks other than 0 do with lines for the person at the console."""


class Clock:
    """Time of steps and of their parts since the last report; validation and saving do not count."""

    def __init__(self, session: Session) -> None:
        train = session.config.train
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.peak_flops = device.matmul_peak_flops(dtype)
        self.flops_per_step = train.tokens_per_step * training_flops_per_token(
            session.config.model, train.window_tokens
        )
        self.processes = session.place.world[1]
        self.tokens_per_step = train.tokens_per_step
        self.pause()
        self.reset()

    def reset(self) -> None:
        """Begins a new interval."""
        self.steps, self.interval_s = 0, 0.0
        self.parts_s = dict.fromkeys(("data", "wait", "forward", "backward", "optimizer"), 0.0)

    def pause(self) -> None:
        """From now on the time belongs to the next step."""
        self._begin = time.perf_counter()

    def start_step(self) -> None:
        """The batch is there."""
        self._data_s = time.perf_counter() - self._begin
        self.parts_s["data"] += self._data_s

    def end_step(self, result: StepResult) -> tuple[float, float]:
        """The step is done.

        Returns:
            Seconds of what this rank did before it had to wait for others (data and forward), and of the whole step.
        """
        step_s = time.perf_counter() - self._begin
        self.steps += 1
        self.interval_s += step_s
        for part, seconds in result.seconds.items():
            self.parts_s[part] += seconds
        return self._data_s + result.seconds.get("forward", 0.0), step_s

    def values(self) -> dict[str, float]:
        """Speed and parts of a mean step since the last report."""
        step_s = self.interval_s / self.steps
        parts = {f"seconds/{part}": seconds / self.steps for part, seconds in self.parts_s.items()}
        return {
            "speed/step_s": step_s,
            "speed/tokens_per_s": self.tokens_per_step / step_s,
            "speed/mfu": self.flops_per_step / step_s / self.peak_flops / self.processes,
            "speed/peak_memory_bytes": device.peak_memory_bytes(),
            **parts,
        }


def announce(session: Session, notify: Callable[[str], None]) -> None:
    """What is about to happen, and the pre-flight warnings."""
    config = session.config
    notify(
        f"{config.name}: {session.parameters / 1e6:.2f}M parameters, {config.model.attention.kind} attention,"
        f" {config.train.batch_lanes} lanes x {config.train.window_tokens} tokens a step,"
        f" {config.train.total_steps} steps, {config.train.precision}{describe_layout(config.parallel)}"
        f" -> {config.directory}"
    )
    warning = gate_warning(config.optim, config.train.total_steps) if config.model.gate_layers else None
    if warning:
        notify(f"warning: {warning}")
    if session.step >= config.train.total_steps:
        notify(f"the run has done all of its {config.train.total_steps} steps; raise train.max_steps to go on")


def describe_layout(parallel: ParallelConfig) -> str:
    """As in: 4 processes (tensor 2 x context 2, ZeRO 1), behind a comma; nothing for one process."""
    ways = ("tensor", "pipeline", "context", "data")
    sizes = {way: getattr(parallel, f"{way}_size") for way in ways}
    parts = " x ".join(f"{way} {size}" for way, size in sizes.items() if size > 1)
    return f", {math.prod(sizes.values())} processes ({parts}, ZeRO {parallel.zero_stage})" if parts else ""


def report_step(session: Session, metrics: Metrics, clock: Clock, result: StepResult, rates: dict[str, float]) -> None:
    """Numbers of the interval since the last report; all ranks call it together."""
    config, step = session.config, session.step
    found = Perplexity(result.loss, math.nan, result.labels, result.n_bytes, 0)
    shared = config.parallel.model_size  # ranks that read the same lanes
    corrupt_documents = round(mesh.sum_over_world([float(session.reader.corrupt_documents)])[0] / shared)
    values = {
        "loss/train": result.loss,
        "perplexity/train": found.perplexity,
        "bits_per_byte/train": found.bits_per_byte,
        "grad_norm": result.grad_norm,
        "tokens": session.tokens,
        "skipped_steps": session.guard.skipped,
        "data/corrupt_documents": corrupt_documents,
        **session.reader.mix(session.lanes),
        **{f"lr/{group}": rate for group, rate in rates.items()},
        **clock.values(),
    }
    gates_LH = gate_matrix(session.stages, session.engine)
    extremes = {} if gates_LH is None else {"gates/lowest": gates_LH.min(), "gates/highest": gates_LH.max()}
    eta_s = (config.train.total_steps - step) * values["speed/step_s"]
    values = {name: value for name, value in values.items() if math.isfinite(value)}  # without labels there is no loss
    metrics.write(step, values)
    write_status(session, values, eta_s)
    line = step_line(step, config.train.total_steps, {**values, **extremes}, eta_s)
    metrics.say(line + damaged(corrupt_documents))
    clock.reset()
    if corrupt_documents > config.data.max_corrupt_documents:
        raise ConfigError(
            f"data.max_corrupt_documents: {corrupt_documents} damaged documents were met, and the limit is"
            f" {config.data.max_corrupt_documents}; see infini-data verify, or raise it"
        )


def report_memory(session: Session, metrics: Metrics, result: StepResult) -> None:
    """Gates and memory norms; nothing for a variant without a memory. All ranks call it together."""
    gates_LH = gate_matrix(session.stages, session.engine)
    if gates_LH is not None:
        metrics.write_gates(session.step, gates_LH)
        metrics.write(session.step, memory_figures(session.stages, result.states))


def is_validation_due(session: Session) -> bool:
    """Every so many steps, and after the last one."""
    every = session.config.eval.every_steps
    return every is not None and (session.step % every == 0 or session.step == session.config.train.total_steps)


def report_validation(session: Session, metrics: Metrics, stop: StopRequest, doing: Callable[[str], None]) -> None:
    """Perplexity of held-out text, with a memory of its own; given up when a signal asks to stop."""
    config = session.config
    assert session.validation is not None
    start = time.perf_counter()
    found = evaluate_perplexity(
        session.stages,
        session.validation,
        lanes=config.eval.batch_lanes or default_lanes(session.stages, config.micro_lanes),
        window_tokens=config.eval.window_tokens or config.train.window_tokens,
        max_tokens=config.eval.max_tokens,
        carry_memory=config.train.carry_memory,
        on_progress=lambda tokens: doing(f"validation at step {session.step}, a window of {tokens} tokens is done"),
        gives_up=lambda: stop.received is not None,
    )
    if found is None:
        return
    metrics.write(
        session.step,
        {
            "loss/validation": found.loss,
            "perplexity/validation": found.perplexity,
            "bits_per_byte/validation": found.bits_per_byte,
            "loss/unigram_entropy": found.unigram_entropy,
        },
    )
    metrics.say(
        f"validation at step {session.step}: loss {found.loss:.4f}  ppl {found.perplexity:.2f}"
        f"  bpb {found.bits_per_byte:.3f}  (unigram entropy {found.unigram_entropy:.4f}; {found.tokens:,} tokens"
        f" in {format_duration(time.perf_counter() - start)}){damaged(found.damaged_documents)}"
    )


def damaged(documents: int) -> str:
    """What the console says of documents that could not be read."""
    return f"  WARNING: {documents} damaged documents left out" if documents else ""


class profiled:
    """Records the next step with torch.profiler if the config asks for it; writes a Chrome trace and a table."""

    def __init__(self, session: Session) -> None:
        self.step = session.step + 1
        self.folder = session.config.directory / "profile"
        wanted = session.place.is_first and self.step in session.config.log.profile_steps
        self.profiler: Any = profile(activities=device.profiled_activities()) if wanted else None

    def __enter__(self) -> None:
        if self.profiler is not None:
            self.profiler.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.profiler is None:
            return
        self.profiler.__exit__(*error)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / f"step-{self.step:08d}.json"))
        table = self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        (self.folder / f"step-{self.step:08d}.txt").write_text(table, encoding="utf-8")
