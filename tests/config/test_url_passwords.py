"""A run's config goes into its folder, its checkpoints and TensorBoard: passwords have no place in it."""

import pytest

from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run


@pytest.mark.parametrize("url", ["https://user:pass@host/data", "https://host/data?sig=abc", "https://abc@host/data"])
@pytest.mark.parametrize("field", ["data.train", "train.init_from", "run_dir", "data.mixture"])
def test_a_password_in_a_url_is_refused_and_not_repeated(field: str, url: str) -> None:
    setting = f"{field}=[{{folder: '{url}', weight: 1}}]" if field == "data.mixture" else f"{field}={url}"
    with pytest.raises(ConfigError, match=rf"^{field}.*: https://.*\*\*\*.*: a password or token in a URL") as caught:
        load_run("debug", [setting])
    assert "pass@" not in str(caught.value) and "abc" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/data", "https://host:8080/data", "abfs://container@account/data"])
def test_other_urls_are_taken(url: str) -> None:
    assert load_run("1b", [f"data.train={url}", "data.cache_dir=cache"]).data.train == url
