"""Files that go with a tokenizer: found, copied, and never waited for."""

import os

import pytest

from infini_train.config.errors import ConfigError
from infini_train.data.model_files import copy_model_files, find_tokenizer_files, parse_end_ids, read_json


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[1]", "is not a JSON object"),
        (b'{"a": }', "is not valid JSON"),
        (b'{"a": NaN}', "is not valid JSON: NaN is not a finite number"),
        (b'{"a": -Infinity}', "is not valid JSON: -Infinity is not"),
        (b'{"a": 1e999}', "is not valid JSON: 1e999 is not a finite number"),
        (b'{"a": "\\ud800"}', r"holds '\\ud800', which can't be written as UTF-8; remove it"),
        (b'{"\\udfff": 1}', r"holds '\\udfff', which"),
        (b'{"a": "\xff"}', "is not valid JSON: 'utf-8' codec can't decode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b"[" * 200_000, "is nested too deeply to be read"),
        (b'{"a": ' * 200_000, "is nested too deeply to be read"),
    ],
)
def test_json_that_no_file_of_ours_could_hold_is_refused(content, problem, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_json(tmp_path / "config.json")
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: {problem}".replace(r"\\", "\\"))


def test_a_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "\\ud83d\\ude42"}')
    assert read_json(tmp_path / "config.json") == {"a": "🙂"}


def test_large_files_pipes_and_devices_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="can't be read: holds more than 1 bytes"):
        read_json(tmp_path / "config.json", max_bytes=1)
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(ConfigError, match="chat_template.jinja: can't be read: is a named pipe, not a file"):
        find_tokenizer_files(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "added_tokens.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="added_tokens.json: can't be read: is a device, not a file"):
        copy_model_files(tmp_path, tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "generation_config.json").symlink_to("gone")
    with pytest.raises(ConfigError, match="generation_config.json: can't be read: No such file"):
        copy_model_files(tmp_path, tmp_path)


def test_copies_leave_what_is_there(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "chat_templates").mkdir(parents=True)
        (tmp_path / name / "generation_config.json").write_text(f'{{"of": "{name}"}}')
    (tmp_path / "a" / "chat_template.jinja").write_text("a")
    (tmp_path / "a" / "chat_templates" / "tool.jinja").write_text("tool")
    (tmp_path / "a" / "README.md").write_text("a")
    copy_model_files(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"of": "b"}'
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "a"
    assert (tmp_path / "b" / "chat_templates" / "tool.jinja").read_text() == "tool"
    assert not (tmp_path / "b" / "README.md").exists()


@pytest.mark.parametrize(("given", "ids"), [(None, []), (3, [3]), ([3, 5, 3], [3, 5]), ([], [])])
def test_ends_are_one_or_several(given, ids):
    assert parse_end_ids({"eos_token_id": given}, "config.json") == ids


@pytest.mark.parametrize("given", ["</s>", [True], [[1]], 2.0, {"a": 1}])
def test_ends_that_are_no_ids_are_refused(given):
    with pytest.raises(ConfigError, match="^config.json: eos_token_id: must be a token id, or a list of them$"):
        parse_end_ids({"eos_token_id": given}, "config.json")
