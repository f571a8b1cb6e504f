"""`infini-train eval perplexity`, which is also what `infini-train eval RUN` does. Imports torch late."""

import argparse
import json
import time
from typing import TYPE_CHECKING

from infini_train.command_line import DIR, describe, positive
from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig
from infini_train.data.shard_file import strict_json
from infini_train.eval.measurement import add_model, load
from infini_train.eval.validation import open_data
from infini_train.logs import progress_bar

if TYPE_CHECKING:
    from infini_train.inference.loading import Trained

STREAM_SEGMENTS = 4  # segments of a forward with --stream
EXAMPLES = """\
examples:
  infini-train eval perplexity runs/demo                 the newest checkpoint on the run's validation data
  infini-train eval perplexity runs/demo --stream --data data/books/validation
  infini-train eval perplexity runs/demo/checkpoints/step-00000100 --window-tokens 4096 --json
  infini-train eval perplexity runs/demo --without memory     what is the memory worth?
  infini-train eval perplexity runs/demo --window-tokens 128 --forget    the memory of one window only

infini-train eval RUN is short for infini-train eval perplexity RUN
"""


def _choose_window(config: RunConfig, window_tokens: int | None, stream: bool) -> int:
    """The window asked for, or that of training; a few segments of a stream, and a warning of what it hides."""
    from infini_train.inference.growth import warn_of_windows

    segment = config.model.segment_tokens
    default = STREAM_SEGMENTS * segment if stream and segment else config.train.window_tokens
    window = window_tokens or default
    if segment and window % segment:
        lower, upper = window // segment * segment, (window // segment + 1) * segment
        near = f"{lower} or {upper}" if lower else str(upper)
        raise ConfigError(
            f"--window-tokens: {window} is not a multiple of the model's segment of {segment} tokens; use {near}"
        )
    if stream:
        warn_of_windows(config.model, window)
    return window


def evaluate_run(
    trained: "Trained",
    data: str | None,
    *,
    lanes: int | None = None,
    window_tokens: int | None = None,
    stream: bool = False,
    max_tokens: int | None = None,
    forget: bool = False,
) -> dict[str, float | int | str]:
    """Perplexity of a dataset under the settings of the command, as plain values.

    Args:
        trained: the model.
        data: folder or URL; None: the run's validation data.
        lanes: documents read side by side; None: one micro-batch of training.
        window_tokens: tokens of a document in one forward; None: as in training, a few segments of a stream.
        stream: whether one document is read after another.
        max_tokens: stop after about this many; None: all.
        forget: drop the memory at each window's edge.

    Raises:
        ConfigError: the data can't be opened, was encoded with another tokenizer, or the window is no multiple of the
            segment.
    """
    from infini_train.eval.perplexity import evaluate_perplexity
    from infini_train.parallel import device

    folder, dataset = open_data(trained, data)
    window = _choose_window(trained.config, window_tokens, stream)
    begin, total = time.perf_counter(), dataset.manifest.tokens + dataset.manifest.documents
    total = min(total, max_tokens or total)
    with progress_bar(total=total, unit="tok", unit_scale=True) as bar:
        found = evaluate_perplexity(
            trained.stages,
            dataset,
            lanes=lanes or trained.config.micro_lanes,
            window_tokens=window,
            max_tokens=max_tokens,
            carry_memory=trained.config.train.carry_memory and not forget,
            on_progress=bar.update,
        )
    assert found is not None
    seconds = time.perf_counter() - begin
    if found.tokens == 0:
        raise ConfigError(f"--data: {folder} holds no text that can be read; try infini-data verify")
    return {
        "checkpoint": str(trained.checkpoint),
        **({"without": " ".join(trained.without)} if trained.without else {}),
        "data": folder,
        "loss": found.loss,
        "unigram_entropy": found.unigram_entropy,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "documents": found.documents,
        "damaged_documents": found.damaged_documents,
        "tokens_per_s": found.tokens / seconds,
        "peak_memory_mb": device.peak_memory_bytes() / 2**20,
    }


# ------------------------------------------------------------------------------------------------------------- command


def add_command(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval perplexity` its options."""
    description = (
        "Measure loss and perplexity of held-out text, beside the unigram entropy of the same tokens (loss and entropy"
        " in nats per token: a model that uses context gets below the entropy)."
    )
    describe(parser, description, EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--data",
        **DIR,
        help="folder written by infini-data encode (default: the run's validation data)",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read documents one after the other, a few segments at a time: constant memory at any length",
    )
    parser.add_argument(
        "--lanes",
        type=positive,
        metavar="N",
        help="number of documents read side by side (default: one micro-batch of training)",
    )
    parser.add_argument(
        "--window-tokens",
        type=positive,
        metavar="N",
        help="number of tokens of a document in one forward, a multiple of the segment (default: as in training; four"
        " segments with --stream)",
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="stop after about N tokens (default: all)")
    parser.add_argument("--forget", action="store_true", help="forget the memory at each window's edge")
    parser.set_defaults(command=_perplexity)


def _perplexity(options: argparse.Namespace) -> None:
    values = evaluate_run(
        load(options),
        options.data,
        lanes=1 if options.stream else options.lanes,
        window_tokens=options.window_tokens,
        stream=options.stream,
        max_tokens=options.max_tokens,
        forget=options.forget,
    )
    if options.json:
        print(json.dumps(strict_json(values)))
        return
    for name, value in values.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{name:<18}{shown}")
