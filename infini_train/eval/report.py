"""`infini-train eval`: perplexity of a trained model on a dataset, as plain values."""

import os
import time
from pathlib import Path

from tqdm import tqdm

from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig
from infini_train.data.cache import is_url
from infini_train.data.shards import Dataset
from infini_train.eval.loading import Trained
from infini_train.eval.perplexity import evaluate_perplexity
from infini_train.parallel import device

STREAM_SEGMENTS = 4  # a forward of --stream


def find_validation(config: RunConfig, run_dir: Path) -> str:
    """The run's validation data: as the config has it, else where the run's folder shows it to be.

    The config's paths are relative to the folder where training ran. That is the run's folder without the end that
    `run_dir` names; and data inside the run's folder are there wherever it was moved.

    Args:
        config: the run's.
        run_dir: where its folder lies now, absolute.

    Raises:
        ConfigError: the run has none, or they are in none of these places.
    """
    if config.data.validation is None:
        raise ConfigError("--data: the run has no validation data; name a folder written by infini-data encode")
    if is_url(config.data.validation):
        return config.data.validation
    given, trained_as = Path(config.data.validation), config.directory
    homes = [Path()]
    if not trained_as.is_absolute() and run_dir.parts[-len(trained_as.parts) :] == trained_as.parts:
        homes.append(Path(*run_dir.parts[: -len(trained_as.parts)]))
    places = [home / given for home in homes]
    if given.is_relative_to(trained_as):
        places.append(run_dir / given.relative_to(trained_as))
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(str(place) for place in places))
        problem = f"the run's validation data were not found (looked for {looked})"
        raise ConfigError(f"data.validation: {problem}; name a folder with --data")
    return str(found)


def _choose_window(config: RunConfig, window_tokens: int | None, stream: bool) -> int:
    """The window asked for, or that of training; a few segments of a stream."""
    segment = config.model.segment_tokens
    default = STREAM_SEGMENTS * segment if stream and segment else config.train.window_tokens
    window = window_tokens or default
    if segment and window % segment:
        lower, upper = window // segment * segment, (window // segment + 1) * segment
        near = f"{lower} or {upper}" if lower else str(upper)
        raise ConfigError(
            f"--window-tokens: {window} is not a multiple of the model's segment of {segment} tokens; use {near}"
        )
    return window


def open_data(trained: Trained, data: str | None) -> tuple[str, Dataset]:
    """The documents to evaluate on, and where they lie.

    Args:
        trained: the model.
        data: folder or URL; None: the run's validation data.

    Raises:
        ConfigError: they can't be opened, or were encoded with another tokenizer.
    """
    run_dir = Path(os.path.abspath(trained.checkpoint)).parent.parent
    folder = data or find_validation(trained.config, run_dir)
    dataset = Dataset.open(folder, trained.config.data.cache_dir)
    if dataset.manifest.tokenizer.sha256 != trained.tokenizer.sha256:
        own = trained.tokenizer_file or "byte"
        raise ConfigError(
            f"--data: {folder} was encoded with another tokenizer than the model's; encode it with --tokenizer {own}"
        )
    return folder, dataset


def evaluate_run(
    trained: Trained,
    data: str | None,
    *,
    lanes: int | None = None,
    window_tokens: int | None = None,
    stream: bool = False,
    max_tokens: int | None = None,
    forget: bool = False,
) -> dict[str, float | int | str]:
    """Evaluates and names the results.

    Raises:
        ConfigError: the data can't be opened, was encoded with another tokenizer, or the window is no multiple of the
            segment.
    """
    folder, dataset = open_data(trained, data)
    window = _choose_window(trained.config, window_tokens, stream)
    begin = time.perf_counter()
    total = dataset.manifest.tokens + dataset.manifest.documents
    with tqdm(total=min(total, max_tokens or total), unit="tok", unit_scale=True, leave=False, disable=None) as bar:
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
