"""What a run reports: its plan at the start, numbers of steps, of the memory, and of held-out text.

Legend: L layers with gates, H query heads.
"""

import logging
import math
import time
from collections.abc import Callable

from infini_train.config.errors import ConfigError
from infini_train.config.parallel import ParallelConfig
from infini_train.config.training import TrainConfig
from infini_train.eval.perplexity import Perplexity, default_lanes, evaluate_perplexity
from infini_train.model.ablation import Part, leaving_out
from infini_train.parallel import mesh
from infini_train.resilience.signals import StopRequest
from infini_train.train.clock import Clock
from infini_train.train.metrics import Metrics, format_duration, step_line
from infini_train.train.optim import gate_warning
from infini_train.train.session import Session
from infini_train.train.state_figures import gate_matrix, memory_figures
from infini_train.train.status import write_status
from infini_train.train.step import StepResult
from infini_train.train.variation import Variation

LOG = logging.getLogger(__name__)


def announce(session: Session) -> None:
    """Model, layout and length of the run, and warnings about settings that can't work out."""
    config = session.config
    LOG.info(
        f"{config.name}: {session.parameters / 1e6:.2f}M parameters, {config.model.attention.kind} attention,"
        f" {config.train.batch_lanes} lanes x {config.train.window_tokens} tokens a step,"
        f" {config.train.total_steps} steps, {config.train.precision}{describe_layout(config.parallel)}"
        f" -> {config.directory}"
    )
    warning = gate_warning(config.optim, config.train.total_steps) if config.model.gate_layers else None
    if warning:
        LOG.warning("warning: %s", warning)
    if session.step >= config.train.total_steps:
        LOG.info(f"the run has done all of its {config.train.total_steps} steps; raise train.max_steps to go on")


def describe_layout(parallel: ParallelConfig) -> str:
    """For example ", 4 processes (tensor 2 x context 2, ZeRO 1)", with the comma; empty for one process."""
    ways = ("tensor", "pipeline", "context", "data")
    sizes = {way: getattr(parallel, f"{way}_size") for way in ways}
    parts = " x ".join(f"{way} {size}" for way, size in sizes.items() if size > 1)
    return f", {math.prod(sizes.values())} processes ({parts}, ZeRO {parallel.zero_stage})" if parts else ""


def report_step(session: Session, metrics: Metrics, clock: Clock, result: StepResult, rates: dict[str, float]) -> None:
    """Numbers of the interval since the last report; all ranks call it together.

    Raises:
        ConfigError: more documents are damaged than `data.max_corrupt_documents` allows.
    """
    config, step = session.config, session.step
    found = Perplexity(result.loss, math.nan, result.labels, result.n_bytes, 0)
    shared = config.parallel.model_size  # ranks that read the same lanes
    groups = session.engine.rates() if config.optim.rules else rates
    corrupt_documents = round(mesh.sum_over_world([float(session.reader.corrupt_documents)])[0] / shared)
    values = {
        **describe_variation(config.train, result.variation),
        "loss/train": result.loss,
        **({} if config.train.teacher is None else {"loss/from_teacher": result.divergence}),
        "perplexity/train": found.perplexity,
        "bits_per_byte/train": found.bits_per_byte,
        "grad_norm": result.grad_norm,
        "tokens": session.tokens,
        "skipped_steps": session.guard.skipped,
        "data/corrupt_documents": corrupt_documents,
        **session.reader.mix(session.lanes),
        **{f"lr/{group}": rate for group, rate in rates.items() if group in groups},
        **clock.values(),
    }
    gates_LH = gate_matrix(session.stages, session.engine)
    extremes = {} if gates_LH is None else {"gates/lowest": gates_LH.min(), "gates/highest": gates_LH.max()}
    eta_s = (config.train.total_steps - step) * values["speed/step_s"]
    values = {name: value for name, value in values.items() if math.isfinite(value)}  # without labels there is no loss
    metrics.write(step, values)
    write_status(session, values, eta_s)
    line = step_line(step, config.train.total_steps, {**values, **extremes}, eta_s)
    LOG.info(line + describe_damage(corrupt_documents))
    clock.reset()
    if corrupt_documents > config.data.max_corrupt_documents:
        raise ConfigError(
            f"data.max_corrupt_documents: {corrupt_documents} damaged documents were met, and the limit is"
            f" {config.data.max_corrupt_documents}; see infini-data verify, or raise it"
        )


def describe_variation(train: TrainConfig, variation: Variation) -> dict[str, float]:
    """What was drawn for a step, by name; of the options that are on alone."""
    values: dict[str, float] = {}
    if variation.segment_tokens is not None:
        values["variation/segment_tokens"] = variation.segment_tokens
    if train.local_dropout:
        values["variation/without_local"] = float(variation.without_local)
    if train.write_cost:
        values["variation/write_cost"] = variation.write_cost
    return values


def report_memory(session: Session, metrics: Metrics, result: StepResult) -> None:
    """Gates and memory norms; nothing for a variant without a memory. All ranks call it together."""
    gates_LH = gate_matrix(session.stages, session.engine)
    if gates_LH is not None:
        metrics.write_gates(session.step, gates_LH)
    figures = memory_figures(session.stages, result.states)
    if figures:
        metrics.write(session.step, figures)


def is_validation_due(session: Session) -> bool:
    """Whether validation follows this step: at every `eval.every_steps`, and after the last step."""
    every = session.config.eval.every_steps
    return every is not None and (session.step % every == 0 or session.step == session.config.train.total_steps)


def report_validation(
    session: Session, metrics: Metrics, stop: StopRequest, on_operation: Callable[[str], None]
) -> None:
    """Perplexity of held-out text, with a memory of its own; abandoned when a signal asks to stop."""
    start = time.perf_counter()
    found = _validate(session, stop, on_operation)
    if found is None:
        return
    values = {
        "loss/validation": found.loss,
        "perplexity/validation": found.perplexity,
        "bits_per_byte/validation": found.bits_per_byte,
        "loss/unigram_entropy": found.unigram_entropy,
    }
    worth = ""
    if session.config.eval.without_memory:
        with leaving_out(session.stages.transformers(), [Part("memory")]):
            without = _validate(session, stop, on_operation)
        if without is not None:  # else a signal asks to stop
            values["loss/validation_without_memory"] = without.loss
            worth = f"; without memory {without.loss:.4f}"
    metrics.write(session.step, values)
    LOG.info(
        f"validation at step {session.step}: loss {found.loss:.4f}  ppl {found.perplexity:.2f}"
        f"  bpb {found.bits_per_byte:.3f}{worth}  (unigram entropy {found.unigram_entropy:.4f}; {found.tokens:,} tokens"
        f" in {format_duration(time.perf_counter() - start)}){describe_damage(found.damaged_documents)}"
    )


def _validate(session: Session, stop: StopRequest, on_operation: Callable[[str], None]) -> Perplexity | None:
    config = session.config
    assert session.validation is not None
    return evaluate_perplexity(
        session.stages,
        session.validation,
        lanes=config.eval.batch_lanes or default_lanes(session.stages, config.micro_lanes),
        window_tokens=config.eval.window_tokens or config.train.window_tokens,
        max_tokens=config.eval.max_tokens,
        carry_memory=config.train.carry_memory,
        on_progress=lambda tokens: on_operation(
            f"validation at step {session.step}, a window of {tokens} tokens is done"
        ),
        gives_up=lambda: stop.received is not None,
    )


def describe_damage(documents: int) -> str:
    """A suffix about documents that could not be read; empty without any."""
    return f"  WARNING: {documents} damaged documents left out" if documents else ""
