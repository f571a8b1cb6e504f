"""Which held-out documents an evaluation reads: those it is given, or the run's validation data. Imports no torch."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig
from infini_train.data.cache import is_url
from infini_train.data.huggingface import HuggingFaceTokenizer
from infini_train.data.shards import Dataset
from infini_train.data.tokenizer import check_ids
from infini_train.redaction import redact_urls

if TYPE_CHECKING:
    from infini_train.inference.loading import Trained


def find_validation(config: RunConfig, run_dir: Path) -> str:
    """The run's validation data: where the config names it, else where the run's folder shows it to be.

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


def open_data(trained: "Trained", data: str | None) -> tuple[str, Dataset]:
    """The held-out documents to evaluate on, and where they lie.

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
    if dataset.manifest.tokenizer.kind != HuggingFaceTokenizer.kind:  # its file doesn't say which ids are special
        check_ids(dataset.manifest, trained.tokenizer, f"--data: {folder}")
    return redact_urls(folder), dataset  # it is printed and kept with the results
