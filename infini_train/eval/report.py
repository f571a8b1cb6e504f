"""`infini-train eval`: perplexity of a trained model on a dataset, as plain values."""

import time

from tqdm import tqdm

from infini_train.config import ConfigError
from infini_train.data.shards import Dataset
from infini_train.eval.loading import Trained
from infini_train.eval.perplexity import evaluate_perplexity
from infini_train.parallel import device

STREAM_SEGMENTS = 4  # a forward of --stream


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
    folder = data or trained.config.data.validation
    if folder is None:
        raise ConfigError("--data: the run has no validation data; name a folder written by infini-data encode")
    dataset = Dataset.open(folder)
    if dataset.manifest.tokenizer.sha256 != trained.tokenizer.sha256:
        own = "byte" if trained.tokenizer.kind == "byte" else trained.checkpoint.parent.parent / "tokenizer.model"
        raise ConfigError(
            f"--data: {folder} was encoded with another tokenizer than the model's; encode it with --tokenizer {own}"
        )
    segment = trained.config.model.segment_tokens
    default = STREAM_SEGMENTS * segment if stream and segment else trained.config.train.window_tokens
    window = window_tokens or default
    if segment and window % segment:
        raise ConfigError(f"--window-tokens: {window} is not a multiple of the model's segment of {segment} tokens")
    begin = time.perf_counter()
    total = dataset.manifest.tokens + dataset.manifest.documents
    with tqdm(total=min(total, max_tokens or total), unit="tok", unit_scale=True, leave=False, disable=None) as bar:
        found = evaluate_perplexity(
            trained.model,
            dataset,
            lanes=lanes or trained.config.train.micro_lanes,
            window_tokens=window,
            max_tokens=max_tokens,
            carry_memory=trained.config.train.carry_memory and not forget,
            on_progress=bar.update,
        )
    seconds = time.perf_counter() - begin
    if found.tokens == 0:
        raise ConfigError(f"--data: {folder} holds no text that can be read; try infini-data inspect --verify")
    return {
        "checkpoint": str(trained.checkpoint),
        "data": str(folder),
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
