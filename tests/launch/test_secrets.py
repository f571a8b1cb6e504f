"""What a submission records and hands to Slurm: enough to reproduce the run, and no secret in any file."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from infini_train.config.errors import ConfigError
from launch.cli import main
from launch.cluster import validate_cluster
from launch.record import describe_environment, describe_revision

ROOT = Path(__file__).resolve().parents[2]
SBATCH = """#!/bin/bash
env -0 > "$CAUGHT/environment"
for word in "$@"; do printf '%s\\0' "$word"; done > "$CAUGHT/words"
cat "${@: -1}" > "$CAUGHT/script"
echo 77
"""
LEAST = {"gpus_per_node": 8, "cores_per_node": 96}
NAMES = """
AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN OPENAI_API_KEY
GITHUB_PAT GH_PAT MYSQL_PWD PGPASSWORD RESTIC_PW KRB5_KEYTAB_DATA MY_CRED NETRC SIGNING_CERT SSH_PRIVATE SESSION_ID
HARMLESS SLURM_JWT NCCL_TOKEN TORCH_PASSWORD
"""
SECRETS = {  # as programs use them; {} stands for the secret
    **dict.fromkeys(NAMES.split(), "{}"),
    "DATABASE_URL": "postgres://user:{}@db/x",
    "HTTPS_PROXY": "http://user:{}@proxy:3128",
    "PIP_INDEX_URL": "https://user:{}@pypi.corp/simple",
    "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=https;AccountKey={}",
    "JWT": "eyJ{}",
    "COOKIE": "session={}",
    "GIT_CONFIG_VALUE_0": "Basic {}",
    "EXTRA_ARGS": "--password={}",
    "BASH_FUNC_x%%": "() {{ echo {}\n}}",
    "APP_CONFIG": '{{"password": "{}"}}',
    # names that are kept, with values that are not
    "SBATCH_EXPORT": "ALL,WANDB_API_KEY={}",
    "NCCL_CONF_FILE": "https://u:{}@host/nccl.conf",
    "PYTHONPATH": "/a:https://{}@host/b",
    "CUDA_NOTE": "hf_{}AbCdEfGhIjKlMnOp",
}


@pytest.fixture
def caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A login node whose sbatch keeps what it is given."""
    folder = tmp_path / "caught"
    (folder / "bin").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("squeue", "#!/bin/bash\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("CAUGHT", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("SBATCH_EXPORT", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str, command: str = "submit", **fields: object) -> int:
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**LEAST, **fields}))
        with pytest.raises(SystemExit) as ended:
            main([command, "1b", "--cluster", str(tmp_path / "cluster.yaml"), "--set=run_dir=run", *arguments])
        return ended.value.code

    return run


def read_environment(caught: Path) -> dict[str, str]:
    words = (caught / "environment").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def written(tmp_path: Path) -> dict[str, str]:
    """But for revision.txt, which has this checkout's own changes, of this very file perhaps."""
    files = (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "revision.txt")
    return {path.name: path.read_text(errors="replace") for path in files}


def test_no_secret_of_the_environment_is_recorded(launch, caught, tmp_path, monkeypatch) -> None:
    for i, (name, value) in enumerate(SECRETS.items()):
        monkeypatch.setenv(name, value.format(f"SeCrEt{i:02d}X"))
    for name, value in (("NCCL_DEBUG", "INFO"), ("OMP_NUM_THREADS", "3"), ("LOADEDMODULES", "cuda/12.4:gcc/13")):
        monkeypatch.setenv(name, value)
    assert launch() == 0
    files = written(tmp_path)
    assert [name for name, text in files.items() if "SeCrEt" in text] == []
    lines = files["environment.txt"].splitlines()
    assert {"NCCL_DEBUG=INFO", "OMP_NUM_THREADS=3", "LOADEDMODULES=cuda/12.4:gcc/13", "SLURM_JWT=***"} <= set(lines)
    assert f"PATH={os.environ['PATH']}" in lines and "NCCL_CONF_FILE=https://u:***@host/nccl.conf" in lines
    assert not any(line.startswith(("HARMLESS", "WANDB", "DATABASE")) for line in lines)


def test_what_is_recorded_is_for_its_owner_alone(launch, caught, tmp_path) -> None:
    (tmp_path / "run" / "launch").mkdir(parents=True, mode=0o755)  # of an earlier version
    (tmp_path / "run" / "launch" / "environment.txt").write_text("old")
    assert launch() == 0
    folder = tmp_path / "run" / "launch"
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("train.sbatch", "run.yaml", "environment.txt", "revision.txt"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600, name


def test_secrets_of_a_cluster_reach_the_job_through_no_file(launch, caught, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "SeCrEt91X")
    values = {"WANDB_API_KEY": "SeCrEt90X", "PROXY": "http://u:SeCrEt92X@p", "HF_TOKEN": None, "NCCL_DEBUG": "INFO"}
    assert launch(environment=values) == 0
    files = written(tmp_path)
    assert [name for name, text in files.items() if "SeCrEt" in text] == []
    assert "export NCCL_DEBUG=INFO\n" in files["train.sbatch"] and "SeCrEt" not in (caught / "script").read_text()
    given = read_environment(caught)
    expected = {"WANDB_API_KEY": "SeCrEt90X", "PROXY": "http://u:SeCrEt92X@p", "HF_TOKEN": "SeCrEt91X"}
    assert {name: given.get(name) for name in expected} == expected
    assert "SeCrEt" not in (caught / "words").read_text() and "--export" not in (caught / "words").read_text()
    for command in ("render", "submit"):
        assert launch(*(["--dry-run"] if command == "submit" else []), command=command, environment=values) == 0
    assert "SeCrEt" not in capfd.readouterr().out


def test_a_script_that_lacks_a_secret_says_so(launch, caught, tmp_path) -> None:
    assert launch(environment={"WANDB_API_KEY": "SeCrEt90X"}) == 0
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n1"}
    script = ["bash", str(tmp_path / "run" / "launch" / "train.sbatch")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: WANDB_API_KEY is not set; give it to sbatch in its environment\n"


def test_a_secret_that_is_set_nowhere_is_refused_before_anything_is_written(launch, caught, tmp_path, capsys) -> None:
    assert launch(environment={"MY_API_KEY": None}) == 2
    assert capsys.readouterr().err.startswith("error: environment.MY_API_KEY: is not set here; export it and rerun")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("site", "options", "expected"),
    [
        (None, [], None),
        ("ALL,A", [], None),
        ("all", [], None),
        ("NONE", [], "--export=WANDB_API_KEY"),
        (None, ["--export=NONE"], "--export=WANDB_API_KEY"),
        ("A,B", ["--export=NONE"], "--export=A,B,WANDB_API_KEY"),
    ],
)
def test_secrets_pass_where_the_environment_does_not(launch, caught, monkeypatch, site, options, expected) -> None:
    if site is not None:
        monkeypatch.setenv("SBATCH_EXPORT", site)
    assert launch(environment={"WANDB_API_KEY": "SeCrEt90X"}, sbatch=options) == 0
    words = (caught / "words").read_text().split("\0")
    assert [word for word in words if word.startswith("--export")] == ([] if expected is None else [expected])


@pytest.mark.parametrize("option", ["--export=ALL,HF_TOKEN=SeCrEt90X", "--comment=hf_SeCrEt90XAbCdEfGhIjKlM"])
def test_a_secret_among_the_options_of_slurm_is_refused(option: str) -> None:
    for field in ("sbatch", "srun"):
        with pytest.raises(ConfigError, match=f"^{field}: .*holds a secret") as caught:
            validate_cluster({**LEAST, field: [option]})
        assert "SeCrEt" not in str(caught.value)


def test_a_password_in_the_runs_config_is_refused(launch, caught, tmp_path, capsys) -> None:
    for command in ("submit", "render"):
        assert launch("--set=data.train=https://user:SeCrEt91X@host/data", command=command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: data.train: https://user:***@host/data: ") and "SeCrEt" not in error
    assert not (tmp_path / "run").exists()


def test_what_would_override_the_script_is_not_passed_on(launch, caught, monkeypatch) -> None:
    """A job that submits another: its own restart count, and the options of its own sbatch."""
    for name in ("SLURM_RESTART_COUNT", "SBATCH_JOB_NAME", "SBATCH_TIMELIMIT", "SBATCH_SIGNAL"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SBATCH_RESERVATION", "mine")
    assert launch() == 0
    given = read_environment(caught)
    assert not given.keys() & {"SLURM_RESTART_COUNT", "SBATCH_JOB_NAME", "SBATCH_TIMELIMIT", "SBATCH_SIGNAL"}
    assert given["SBATCH_RESERVATION"] == "mine"


def test_uncommitted_changes_keep_their_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    path.write_text("lr: 3\nurl: https://u:SeCrEt01X@h\nWANDB_API_KEY=SeCrEt02X\npassword: SeCrEt03X\n")
    (tmp_path / "untracked.txt").write_text("SeCrEt04X")
    for name in ("diff.external", "core.fsmonitor"):  # a checkout's config must not choose what runs here
        git("config", name, f"touch {tmp_path / 'broken'}")
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))
    text = describe_revision(tmp_path)
    assert "+lr: 3\n" in text and "?? untracked.txt" in text and text.count("***") == 4 and "SeCrEt" not in text
    assert not (tmp_path / "broken").exists()

    (tmp_path / "untracked.txt").unlink()
    (tmp_path / "code").mkdir()
    _, first, *_ = describe_revision(tmp_path / "code").splitlines()
    assert first == " M config.yaml", "from the repository's root, with its leading blank"


def test_odd_values_stay_on_their_line() -> None:
    given = {"NCCL_A": "1\nNCCL_B=2", "PATH": "/a\udcff", "TZ": "naïve"}
    assert describe_environment(given) == "NCCL_A=1\\nNCCL_B=2\nPATH=/a\\udcff\nTZ=naïve\n"
