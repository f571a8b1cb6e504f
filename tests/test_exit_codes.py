"""The codes that a batch script writes as numbers are those of the programs."""

import errno
import re
from pathlib import Path

import pytest

from infini_train import cli, exit_codes
from infini_train.train import loop

ROOT = Path(__file__).resolve().parents[1]
BATCH_SCRIPT = (ROOT / "slurm" / "templates" / "train.sbatch.j2").read_text(encoding="utf-8")


def test_a_process_ends_with_a_code_as_a_shell_has_it() -> None:
    assert [exit_codes.of_process(code) for code in (0, 4, -15, -9)] == [0, 4, 143, 137]
    assert sorted(exit_codes.STOPPED) == [129, 130, 143]


@pytest.mark.parametrize(
    ("pattern", "codes"),
    [
        (r"case \$code in ([\d| ]+)\) exit 0", {exit_codes.DONE, exit_codes.BAD_NODE, *exit_codes.STOPPED}),
        (r"!~ /\^\(([\d|]+)\)\$/", set(exit_codes.STOPPED)),
        (r"ends \"\$1\" (\d) \| awk '\{print \$3\}'", {exit_codes.BAD_NODE}),
        (r"ends \"\$1\" '(\d\|\d)'", {exit_codes.MISTAKE, exit_codes.DIVERGED}),
        (r"\$code =~ \^\(([\d|]+)\)\$ \]\] && \[ \"\$start\" = 0", {exit_codes.MISTAKE, 126, 127}),
        (r"\"\$code\" = (\d) \]; then # the last checkpoint", {exit_codes.DIVERGED}),
    ],
)
def test_the_batch_script_knows_the_codes(pattern: str, codes: set[int]) -> None:
    found = re.findall(pattern, BATCH_SCRIPT)
    assert found
    for each in found:
        assert {int(code) for code in each.split("|")} == codes


def test_every_code_is_listed() -> None:
    documented = set(re.findall(r"^    (\d+)  ", exit_codes.__doc__ or "", re.MULTILINE))
    named = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert documented == {str(code) for code in named - set(exit_codes.STOPPED)} | {"75"}
    assert set(map(int, re.findall(r"\bexit (\d+)$", BATCH_SCRIPT, re.MULTILINE))) <= {*map(int, documented)}


def test_a_file_system_that_fails_while_training_is_worth_a_retry(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 would have the batch script give up at the first start."""

    def train(_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "/data/x")

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "debug"])
    assert ended.value.code == exit_codes.FAILED
    assert capfd.readouterr().err.endswith("error: /data/x: Stale file handle; fix it and rerun\n")
