"""What is taken out of texts before they are written or shown, and what is left as it is."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.command_errors import run_command
from infini_train.config.errors import ConfigError
from infini_train.redaction import find_secret_url, is_secret_name, redact, redact_urls, redact_variable

ROOT = Path(__file__).resolve().parents[1]
SECRETS = [
    "https://user:{}@pypi.corp/simple",
    "http://user:{}@proxy:3128",
    "https://u:a/{}@x/y",
    "https://u:a@{}@x/y",
    "https://{}@sentry.io/1",
    "redis://:{}@h",
    "postgres://user:{}@db:5432/x",
    "can't open https://u:{}@h/a and https://u:{}@h/b",
    "https://hooks.slack.com/services/T/B/{}",
    "https://bucket/a.tar?X-Amz-Credential=a&X-Amz-Signature={}",
    "https://account.blob.core.windows.net/c/a?sv=1&sig={}&se=2",
    "https://host/a?access_token={}",
    "DefaultEndpointsProtocol=https;AccountKey={}",
    "ALL,WANDB_API_KEY={},HOME",
    "--export=ALL,HF_TOKEN={}",
    "+export DB_PASSWORD={}",
    '+    password = "{}"',
    "+    password: {}",
    "+WANDB_API_KEY={}",
    '+  "apiKey": "{}",',
    "+hf_token: {}",
    "--password={}",
    "--password {}",
    "pipe:curl -u user:{} https://host/a.tar",
    "pipe:curl --header 'Authorization: Bearer {}' https://host/a.tar",
    "pipe:curl --header 'Authorization: Token {}' https://host/a.tar",
    "+DBPASSWORD={}",
    "+hftoken: {}",
    "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----",
    "comment hf_{}AbCdEfGhIjKlMnOp",
    "ghp_{}AbCdEfGhIjKlMnOp",
    "eyJ{}AbCdEf.eyJhIjoxAbCd.c2ln",
]


@pytest.mark.parametrize("template", SECRETS)
def test_a_secret_is_replaced(template: str) -> None:
    shown = redact(template.replace("{}", "SeCrEt07X"))
    assert "SeCrEt07X" not in shown and "***" in shown, shown


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a/b@2.tar?part=1&tokens=5",
        "s3://bucket/folder/a.tar",
        "abfs://container@account.dfs.core.windows.net/folder",
        "http://[::1]:8080/x@y",
        "ssh://git@host/repository",
        "github://owner:name@branch/folder",
        "hf://datasets/owner/name@revision/train",
        "zip://a.jsonl::https://host/a@b.zip",
        "/opt/cuda-12.4/lib64:/usr/lib",
        "segment_tokens: 2048",
        'eos_token: "</s>"',
        "key = parameters[name]",
        "    key: str",
        "    password: str",
        "def find(key, token=None):",
        "KEY = re.compile(pattern)",
        "tokens=4096",
        "NCCL_IB_HCA=mlx5",
        "TOKENIZERS_PARALLELISM=false",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_names_that_hold_secrets() -> None:
    secret = ["WANDB_API_KEY", "GITHUB_PAT", "MYSQL_PWD", "PGPASSWORD", "SLURM_JWT", "hfToken", "SENTRY_DSN", "MY_CRED"]
    secret += ["HFTOKEN", "DBPASSWORD", "dbpasswd", "AWSSECRET", "ACCESSKEY", "SSHPASS"]
    plain = ["PATH", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "SLURM_JOB_ID", "KEYBOARD", "OMP_PLACES", "PASSES"]
    assert [name for name in secret if not is_secret_name(name)] == []
    assert [name for name in plain if is_secret_name(name)] == []
    assert redact_variable("SLURM_JWT", "anything") == "***"
    assert redact_variable("NCCL_NET", "https://u:p@h") == "https://u:***@h"


def test_the_program_itself_is_left_as_it_is() -> None:
    """A recorded diff is to reproduce a run: of this project's own source next to nothing may be masked."""
    changed = {}
    for path in sorted((ROOT / "infini_train").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if redact(text) != text and path.name != "redaction.py":
            changed[path.name] = [line for line in text.splitlines() if redact(line) != line]
    assert changed == {}


def test_a_message_that_goes_on_after_a_url_keeps_its_colon() -> None:
    line = "data.train: https://h/x?token=abc: a token"
    assert redact_urls(line) == redact_urls(redact_urls(line)) == "data.train: https://h/x?token=***: a token"
    assert redact_urls("https://h/x?sig=a:b,c&x=1, next") == "https://h/x?sig=***&x=1, next"
    assert redact_urls("https://hooks.h.com/T0/B1: no answer") == "https://hooks.h.com/***: no answer"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_masking_twice_changes_nothing_more(text: str) -> None:
    for mask in (redact, redact_urls):
        assert mask(mask(text)) == mask(text)


def test_long_texts_take_no_time_that_grows_with_their_square() -> None:
    """A pattern that tries each start again would take hours here."""
    for text in ("a" * 500_000, "https://" * 20_000, "a:" * 50_000, "-" * 100_000, "://a:b/" * 20_000, "eyJ-" * 50_000):
        redact(text)


def test_the_field_of_a_url_with_a_password_is_named() -> None:
    tree = {"data": {"mixture": [{"folder": "s3://a/b"}, {"folder": "https://u:pw@h/a"}]}, "name": "a:b@c"}
    assert find_secret_url(tree) == ("data.mixture.1.folder", "https://u:***@h/a")
    assert find_secret_url({"data": {"train": "https://h:80/a", "parts": [1, None]}}) is None


@pytest.mark.parametrize(
    "error", [ConfigError("https://u:secret@h/a: no such file"), OSError(5, "I/O error", "s3://u:secret@h")]
)
def test_a_commands_error_holds_no_secret(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    assert run_command(command) == 2
    shown = capsys.readouterr().err
    assert "u:***@h" in shown and "secret" not in shown
