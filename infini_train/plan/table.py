"""A plan as text: facts of the whole, then a column for each rank."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from infini_train.checkpoint.contents import format_size
from infini_train.config.run import RunConfig
from infini_train.model.caching import name_layers
from infini_train.plan.dry_run import Plan, RankPlan, Span
from infini_train.plan.states import StateBytes

COLUMNS = 6  # ranks side by side
TEXTS = (1, 2**10, 2**20)  # tokens read
STATES = {"weights": "weights", "gradients": "gradients", "masters": "fp32 masters", "moments": "moments"}
Row = tuple[str, Callable[[RankPlan], str]]


def format_plan(plan: Plan) -> str:
    """Facts, columns, notes."""
    blocks = ["\n".join(f"{name:<24}{value}" for name, value in _facts(plan))]
    for first in range(0, len(plan.ranks), COLUMNS):
        blocks.append(_format_columns(plan, plan.ranks[first : first + COLUMNS]))
    blocks += [_format_traffic(plan), _format_time(plan)]
    blocks += [note if note.startswith("warning: ") else f"note: {note}" for note in plan.notes]
    return "\n\n".join(blocks)


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    config, train = plan.config, plan.config.train
    yield "run", f"{config.name} on {plan.world_size:,} process{'es' if plan.world_size > 1 else ''}"
    yield "layout", _layout(config)
    raised = f" (runs as {plan.zero_stage})" if plan.zero_stage != config.parallel.zero_stage else ""
    offload = ", optimizer offloaded" if config.parallel.offload_optimizer else ""
    yield "ZeRO stage", f"{config.parallel.zero_stage}{raised}{offload}, {train.precision}"
    yield "step", f"{train.batch_lanes:,} lanes x {train.window_tokens:,} tokens = {train.tokens_per_step:,} tokens"
    yield "parameters", f"{plan.parameters:,}"
    yield from zip(("FLOPs a token", "of the forward"), _flops(plan), strict=True)
    yield "memory of a lane", format_size(plan.carried_lane_bytes)
    yield from _caches(plan)
    yield "checkpoint", format_size(plan.checkpoint_bytes)


def _flops(plan: Plan) -> tuple[str, str]:
    """FLOPs of forward and backward, and what the forward's are for."""
    total = sum(plan.flops_per_token.values())
    again = 1.0 if plan.config.train.activation_checkpointing == "layer" else 0.0
    shares = {name.replace("_", " "): part / total for name, part in plan.flops_per_token.items() if part}
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    recompute = f" + {_giga(again * total)} recomputed" if again else ""
    return f"{_giga(total)} forward + {_giga(2 * total)} backward{recompute}", parts


def _caches(plan: Plan) -> Iterator[tuple[str, str]]:
    """What layers that attend to everything keep of a lane, if there are any: it grows, beside the constant memory."""
    if not plan.caching_layers:
        return
    train = plan.config.train
    window = format_size(plan.cached_token_bytes[train.precision] * train.window_tokens)
    place = "layer at work" if train.activation_checkpointing == "layer" else "activations kept"
    yield "keys and values", f"{name_layers(plan.caching_layers)}: {window} a lane and window, within {place}"
    for precision, size in plan.cached_token_bytes.items():
        one, few, many = (format_size(size * tokens) for tokens in TEXTS)
        yield f"kept when reading, {precision}", f"{one} a token and lane: {few} at 1K tokens, {many} at 1M"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g}G"


def _format_traffic(plan: Plan) -> str:
    """What the rank that sends most sends in a step; empty with one process."""
    rank = max(plan.ranks, key=lambda each: sum(one.sent_bytes for one in each.collectives), default=None)
    if rank is None or not rank.collectives:
        return "no communication"
    lines = [f"sent in a step by rank {rank.rank:<4}  {'kind':<16}{'ranks':>6}{'calls':>9}{'a call':>12}{'sent':>12}"]
    for one in rank.collectives:
        each = format_size(round(one.buffer_bytes / one.calls))
        sent = format_size(round(one.sent_bytes))
        lines.append(f"{one.name:<29}  {one.kind:<16}{one.ranks:>6}{one.calls:>9,.0f}{each:>12}{sent:>12}")
    return "\n".join(lines)


def _format_time(plan: Plan) -> str:
    """The predicted step, and where its time goes."""
    found, hardware = plan.prediction, plan.hardware
    head = (
        f"predicted on {hardware.name}: {found.step_s:.3g} s a step, {found.tokens_s:,.0f} tokens/s,"
        f" MFU {found.mfu:.1%}, pipeline bubble {found.bubble:.1%}"
    )
    lines = [f"{name:<29}  {value:>9.4g} s{value / found.step_s:>8.1%}" for name, value in found.seconds.items()]
    return "\n".join([head, *lines])


def _layout(config: RunConfig) -> str:
    parallel = config.parallel
    virtual = f" ({parallel.virtual_stages} virtual stages each)" if parallel.virtual_stages > 1 else ""
    sequence = " with sequence parallelism" if parallel.sequence_parallel else ""
    return (
        f"tensor {parallel.tensor_size}{sequence} x context {parallel.context_size} x data {parallel.data_size}"
        f" x pipeline {parallel.pipeline_size}{virtual}"
    )


def _format_columns(plan: Plan, ranks: Sequence[RankPlan]) -> str:
    rows = [(name, [show(rank) for rank in ranks]) for name, show in _rows(plan)]
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(ranks))]
    return "\n".join(
        f"{name:<24}" + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    )


def _rows(plan: Plan) -> Iterator[Row]:
    yield "pipeline stage", lambda rank: str(rank.place.pipeline[0])
    yield "rank", lambda rank: str(rank.rank)
    yield "layers", lambda rank: " ".join(map(_span, rank.layers))
    yield "query heads", lambda rank: _span(rank.heads)
    yield "key-value heads", lambda rank: _span(rank.kv_heads)
    yield "rows of the embedding", lambda rank: _span(rank.embedding_rows)
    yield "rows of the head", lambda rank: _span(rank.head_rows)
    yield "tokens of the window", lambda rank: _span(rank.tokens)
    yield "lanes", lambda rank: _span(rank.lanes)
    yield "micro-batches", lambda rank: f"{rank.micro_batches} of {rank.micro_batch_lanes}"
    yield "parameters", lambda rank: f"{rank.parameters:,}"
    offload = plan.config.parallel.offload_optimizer
    names = list(STATES.items())
    yield from _state_rows("", lambda rank: rank.device, names[:2] if offload else names)
    yield "carried memory", lambda rank: format_size(rank.carried_bytes)
    yield "sum", lambda rank: format_size(rank.device.total + rank.carried_bytes)
    yield "activations kept", lambda rank: format_size(round(rank.memory.activations))
    yield "logits and loss", lambda rank: format_size(round(rank.memory.logits))
    yield "layer at work", lambda rank: format_size(round(rank.memory.working))
    yield "buffers", lambda rank: format_size(round(rank.memory.buffers))
    yield "buckets of gradients", lambda rank: format_size(round(rank.memory.buckets))
    yield "optimizer's step", lambda rank: format_size(round(rank.memory.step))
    yield "predicted peak", lambda rank: format_size(round(rank.memory.peak))
    if offload:
        yield from _state_rows("host: ", lambda rank: rank.host, names[1:])
        yield "host: sum", lambda rank: format_size(rank.host.total)
    yield "carried, one lane", lambda rank: format_size(rank.carried_lane_bytes)
    if plan.config.parallel.context_size > 1:
        yield "sent, layer and lane", lambda rank: " + ".join(map(format_size, rank.sent_bytes))
    yield "checkpoint files", lambda rank: format_size(rank.checkpoint_bytes)


def _state_rows(
    prefix: str, states: Callable[[RankPlan], StateBytes], names: Iterable[tuple[str, str]]
) -> Iterator[Row]:
    def row(name: str, label: str) -> Row:
        return prefix + label, lambda rank: format_size(getattr(states(rank), name))

    yield from (row(name, label) for name, label in names)


def _span(span: Span | None) -> str:
    """First and last, both inclusive."""
    if span is None:
        return "-"
    return str(span[0]) if span[1] == span[0] + 1 else f"{span[0]}-{span[1] - 1}"
