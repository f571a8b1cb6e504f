"""Batch scripts as text: golden ones, valid bash, and nothing that a config says reaches the shell unquoted."""

import dataclasses
import os
import re
import runpy
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from infini_train.config.errors import ConfigError
from infini_train.config.files import load_run
from launch.cluster import ContainerConfig, RestartConfig, load_cluster, validate_cluster
from launch.job import Job, plan_job, plan_scales
from launch.render import job_name, render_encoding, render_evaluation, render_training

ROOT = Path(__file__).resolve().parents[2]
READY = sorted((ROOT / "slurm").glob("*.sbatch"))
CHECKED = ("encode", "eval_1b", "train_1b", "train_8b")  # the others differ in their values only
CLUSTERS = sorted(path.stem for path in (ROOT / "configs" / "cluster").glob("*.yaml"))

# Stand-ins for Slurm's commands and for the programs: they keep the words and variables that reach them.
SRUN = """#!/bin/bash
for word in "$@"; do printf '%s\\0' "$word"; done > "$CAUGHT/words"
env -0 > "$CAUGHT/environment"
"""
NOTHING = "#!/bin/bash\ncat > /dev/null < /dev/null\n"


def test_the_ready_scripts_are_those_of_the_templates() -> None:
    """Mend it with: python slurm/generate.py."""
    rendered = runpy.run_path(str(ROOT / "slurm" / "generate.py"))["render_all"]()
    assert {path.name: path.read_text(encoding="utf-8") for path in READY} == rendered
    assert [name for name in rendered if name.startswith("train_")] == [f"train_{size}.sbatch" for size in SIZES]


SIZES, NODES = ("1b", "3b", "8b"), (1, 4, 16, 64)
FAMILY = [(size, nodes) for size in SIZES for nodes in NODES]


def member_name(size: str, nodes: int) -> str:
    return size if nodes == 1 else f"{size}_{nodes}nodes"


@pytest.mark.parametrize(("size", "nodes"), FAMILY)
def test_a_script_for_other_nodes_differs_in_two_lines(size: str, nodes: int) -> None:
    """Rendering for N nodes, and sbatch --nodes=N with the ready script, run the same job."""
    cluster = load_cluster("plain")
    ready = (ROOT / "slurm" / f"train_{size}.sbatch").read_text(encoding="utf-8")
    name = member_name(size, nodes)
    expected = ready.replace(f"--job-name={size}\n", f"--job-name={name}\n").replace(
        "--nodes=1\n", f"--nodes={nodes}\n"
    )
    assert render_training(plan_scales(size, cluster, (), nodes), cluster) == expected


@pytest.mark.parametrize(("size", "nodes"), FAMILY)
def test_a_script_of_one_scale_is_the_ready_one_but_for_the_choice(size: str, nodes: int) -> None:
    """The lines that differ are those that the case statement chooses, and the command."""
    cluster, name = load_cluster("plain"), member_name(size, nodes)
    ready = render_training(plan_scales(size, cluster, (), nodes), cluster).splitlines()
    first, last = next(i for i, line in enumerate(ready) if line.startswith("case $SLURM_NTASKS")), ready.index("esac")
    chosen = f'train=(infini-train train {size} --world-size="$SLURM_NTASKS")'
    assert ready[last + 1] == chosen
    config = "run.yaml"  # as infini-launch submit freezes it
    run = load_run(size, (), nodes * 8)
    alone = render_training(plan_job(run, cluster, config), cluster).splitlines()
    choice = [f"run_dir=runs/{name}", f"train=(infini-train train {config})"]
    assert alone == [*ready[:first], *choice, *ready[last + 2 :]]


@pytest.mark.parametrize(("size", "nodes"), FAMILY)
def test_the_ready_script_follows_the_nodes_that_it_gets(size: str, nodes: int, tmp_path: Path) -> None:
    write_programs(tmp_path)
    script = (ROOT / "slurm" / f"train_{size}.sbatch").read_text(encoding="utf-8")
    script = re.sub(r"^(venv|PATH)=.*\n|^preflight=.*\n", "", script, flags=re.MULTILINE)
    (tmp_path / "script").write_text(script.replace("max_retries=3", "preflight=()\nmax_retries=3"))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(8 * nodes), "SLURM_JOB_NODELIST": "n1", "CAUGHT": str(tmp_path)}
    environment = {**slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    subprocess.run(["bash", "script"], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    words = (tmp_path / "words").read_bytes().decode().split("\0")
    assert words[-5:-1] == ["infini-train", "train", size, f"--world-size={8 * nodes}"]
    run = load_run(size, (), 8 * nodes)
    assert (tmp_path / run.directory / "launch" / "starts").is_file()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name] == [member_name(size, nodes)]


def test_settings_hold_at_every_scale_or_rule_it_out() -> None:
    cluster = load_cluster("plain")
    job = plan_scales("8b", cluster, ["train.batch_lanes=32", "run_dir=runs/a b"])
    assert dict(job.scale_dirs) == {32: "runs/a b", 128: "runs/a b"}, "64 data-parallel ranks have no use for 32 lanes"
    assert job.settings == ("train.batch_lanes=32", "run_dir=runs/a b")
    assert "32) run_dir='runs/a b' ;; # --nodes=4" in render_training(job, cluster)
    narrow = dataclasses.replace(cluster, gpus_per_node=3)
    assert (
        plan_scales(
            "1b", narrow, ["parallel.context_size=1", "parallel.data_size=6", "train.batch_lanes=36"]
        ).scale_dirs
        == {}
    )


def test_a_scale_of_another_cluster_is_for_other_nodes() -> None:
    cluster = dataclasses.replace(load_cluster("plain"), gpus_per_node=4)
    job = plan_scales("8b", cluster, (), 32)
    assert (job.name, job.nodes) == ("8b_16nodes", 32)
    assert plan_job(load_run("8b_16nodes"), cluster, "8b_16nodes").nodes == 32


def render_golden() -> dict[str, str]:
    """What the ready scripts, all for the plain cluster, have not: containers, modules, chains, awkward words."""
    h100, pyxis = load_cluster("h100"), load_cluster("pyxis")
    chain = dataclasses.replace(h100, requeue=False, preflight=False, network_interface="^lo", modules=("gcc/12",))
    return {
        "train_h100": render_training(plan_job(load_run("8b"), h100, "8b"), h100),
        "train_chain": render_training(plan_job(load_run("1b"), chain, "1b", ("name=it's",)), chain),
        "train_pyxis": render_training(plan_job(load_run("1b"), pyxis, "1b"), pyxis),
        "eval_pyxis": render_evaluation("an eval", ["runs/a b"], pyxis, gpus=2),
        "encode_h100": render_encoding(["a b/", "--tokenizer=byte", "--out=x'y"], 3, chain),
    }


@pytest.mark.parametrize(("name", "text"), render_golden().items(), ids=render_golden())
def test_renderings_are_the_golden_ones(name: str, text: str) -> None:
    """After a change that is meant: GOLDEN=write python -m pytest tests/launch/test_render.py, and read the diff."""
    path = Path(__file__).parent / "golden" / f"{name}.sbatch"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_renders_to_valid_bash(name: str, tmp_path: Path) -> None:
    cluster = load_cluster(name)
    texts = [
        render_training(plan_job(load_run("8b"), cluster, "8b"), cluster),
        render_evaluation("eval", ["runs/8b"], cluster),
        render_encoding(["a b/", "--tokenizer=byte", "--out=x'y"], 3, cluster),
        render_encoding(["a"], 3, dataclasses.replace(cluster, requeue=False)),
    ]
    for text in texts:
        path = tmp_path / "script.sbatch"
        path.write_text(text)
        subprocess.run(["bash", "-n", str(path)], check=True)
        if shutil.which("shellcheck"):
            done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


def test_ready_scripts_pass_shellcheck() -> None:
    for path in READY:
        subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", *(str(ROOT / "slurm" / f"{name}.sbatch") for name in CHECKED)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_environment_follows_the_layout() -> None:
    h100, run = load_cluster("h100"), load_run("8b")
    exports = plan_job(run, h100, "8b").exports
    assert exports["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and exports["NCCL_SOCKET_IFNAME"] == "ib0"
    assert exports["GLOO_SOCKET_IFNAME"] == "ib0" and exports["OMP_NUM_THREADS"] == "8"
    assert int(exports["TORCH_FR_BUFFER_SIZE"]) > 0 and exports["NCCL_IB_HCA"] == "mlx5"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in plan_job(load_run("1b"), h100, "1b").exports


def test_pyxis_puts_ranks_into_the_container() -> None:
    cluster = load_cluster("pyxis")
    text = render_training(plan_job(load_run("1b"), cluster, "1b"), cluster)
    assert "--container-image=infini-train.sqsh" in text and "--container-mounts=/scratch:/scratch" in text


@pytest.mark.parametrize(("name", "nodes"), [("1b", 1), ("3b", 4), ("8b", 16), ("8b", 64)])
def test_nodes_follow_from_the_layout(name: str, nodes: int) -> None:
    assert plan_job(load_run(name, (), 8 * nodes), load_cluster("plain"), name).nodes == nodes


def test_nodes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="^3 nodes x 8 tasks don't fit the run: parallel: "):
        plan_job(load_run("8b"), load_cluster("plain"), "8b", nodes=3)


# ------------------------------------------------------------------------------------------------------------- quoting

LINE = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=30
)
LINES = LINE.filter(lambda text: text.isprintable() and text.strip())
EVIL = '\'; touch broken; $(touch broken) `touch broken` "$HOME" \\'


def write_programs(folder: Path) -> None:
    for name in ("srun", "scontrol", "scancel", "sleep"):
        path = folder / name
        path.write_text(SRUN if name == "srun" else NOTHING)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=LINES, setting=LINES, value=LINES, image=LINES, run_dir=LINES)
@example(name=EVIL, setting=EVIL, value=EVIL, image=EVIL, run_dir=EVIL.replace("/", ""))
def test_no_value_is_read_by_the_shell(
    name: str, setting: str, value: str, image: str, run_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The script runs against stand-ins for Slurm's commands; every value arrives as it was given."""
    folder = tmp_path_factory.mktemp("quoting")
    write_programs(folder)
    run_dir = f"runs/{run_dir.replace('/', '-')}"
    tree = {"gpus_per_node": 0, "tasks_per_node": 1, "cores_per_node": 1, "environment": {"VALUE": value}}
    cluster = validate_cluster({**tree, "preflight": False, "container": {"image": image}})
    job = Job(name=name, config=f"./{name}", settings=(setting,), run_dir=run_dir, nodes=1, exports=cluster.environment)
    (folder / "script").write_text(render_training(job, cluster))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "n1", "CAUGHT": str(folder)}
    environment = {**slurm, "PATH": f"{folder}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    subprocess.run(["bash", "script"], cwd=folder, env=environment, capture_output=True, timeout=60)
    words = (folder / "words").read_bytes().decode().split("\0")
    assert words[-5:-1] == ["infini-train", "train", f"./{name}", f"--set={setting}"]
    assert f"--container-image={image}" in words
    assert f"VALUE={value}" in (folder / "environment").read_bytes().decode().split("\0")
    assert (folder / run_dir / "launch" / "starts").is_file()
    expected = {"script", "words", "srun", "scontrol", "scancel", "sleep", "environment", "runs"}
    assert {path.name for path in folder.iterdir()} == expected, "something else was written"


def run_task(folder: Path, text: str, task: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """A task of an array that was submitted alone."""
    write_programs(folder)
    (folder / "script").write_text(re.sub(r"^(venv|PATH)=.*\n", "", text, flags=re.MULTILINE))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": str(task)}
    environment = {**slurm, "SLURM_ARRAY_TASK_COUNT": "1", "CAUGHT": str(folder), **variables}
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(["bash", "script"], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_a_task_of_an_array_keeps_its_part_when_it_is_submitted_alone(tmp_path: Path) -> None:
    cluster = load_cluster("plain")
    text = render_encoding(["text/"], 7, cluster, "3,5-6")
    assert (
        "#SBATCH --array=3,5-6\n" in text
        and text.splitlines()[3:] == render_encoding(["text/"], 7, cluster).splitlines()[3:]
    )
    assert run_task(tmp_path, text, 3).returncode == 0
    assert (tmp_path / "words").read_text().split("\0")[-2] == "--part=4/7"
    (tmp_path / "words").unlink()
    done = run_task(tmp_path, text, 7)
    assert done.returncode == 2 and done.stderr == "error: task 7 of the array: the tasks of 7 parts are 0 to 6\n"
    assert not (tmp_path / "words").exists()


@pytest.mark.parametrize("tasks", ["7", "0-7", "", "a", "3;touch x", "1,", "3\n", "٣", "99999999999"])
def test_tasks_that_an_array_has_not_are_refused(tasks: str) -> None:
    with pytest.raises(ConfigError, match=r"^--tasks: "):
        render_encoding(["text/"], 7, load_cluster("plain"), tasks)


@pytest.mark.parametrize(
    ("restarts", "preempted", "code"), [(0, "None", 0), (1, "None", 1), (1, "2026-11-29T22:00:00", 0)]
)
def test_a_task_that_is_told_to_stop_as_it_starts_is_not_requeued_for_ever(
    tmp_path: Path, restarts: int, preempted: str, code: int
) -> None:
    """Once; more often only if it is preempted."""
    text = render_encoding(["text/"], 7, load_cluster("plain"))
    write_programs(tmp_path)
    begin = f'set -euo pipefail; SLURM_RESTART_COUNT={restarts}; scontrol() {{ echo "$1 PreemptTime={preempted} "; }}'
    text = text.replace("set -euo pipefail", begin)
    done = run_task(tmp_path, text.replace("srun --mpi", "kill -USR1 $$; srun --mpi"), 0)
    assert done.returncode == code, done.stderr
    assert ("requeue" in done.stdout) == (code == 0)


def test_the_words_of_an_encoding_arrive_as_they_are(tmp_path: Path) -> None:
    write_programs(tmp_path)
    tree = {"gpus_per_node": 8, "cores_per_node": 96, "environment": {"VALUE": EVIL}}
    text = render_encoding([EVIL, "a b/", f"--out={EVIL}"], 7, validate_cluster(tree))
    assert "#SBATCH --array=0-6\n" in text and "gpu" not in text and "gres" not in text
    (tmp_path / "script").write_text(text)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0"}
    environment = {**slurm, "SLURM_ARRAY_TASK_COUNT": "7", "CAUGHT": str(tmp_path), "LC_ALL": "C.UTF-8"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", "script"], cwd=tmp_path, env=environment, check=True, timeout=60)
    words = (tmp_path / "words").read_bytes().decode().split("\0")
    assert words[-7:-1] == ["infini-data", "encode", EVIL, "a b/", f"--out={EVIL}", "--part=4/7"]
    assert f"VALUE={EVIL}" in (tmp_path / "environment").read_bytes().decode().split("\0")
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("word", ["--part=1/2", "--par", "--restart", "--overwrite", "a\nb"])
def test_an_array_refuses_what_its_tasks_cannot_have(word: str) -> None:
    with pytest.raises(ConfigError, match="^encode: "):
        render_encoding(["text/", word], 2, load_cluster("plain"))


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=40))
def test_a_job_name_is_harmless(name: str) -> None:
    assert set(job_name(name)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


LONG = "llama-1b-infini-books-segment2048-window32768-delta-update-batch64"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((f"{LONG}-lr1e-4", "runs/a"), (f"{LONG}-lr3e-4", "runs/b")),
        ((f"{LONG}-lr1e-4", f"runs/{LONG}-lr1e-4"), (f"{LONG}-lr3e-4", f"runs/{LONG}-lr3e-4")),
        (("обучение", "runs/обучение"), ("проверка", "runs/проверка")),
        (("a b", "runs/a b"), ("a-b", "runs/a-b")),
        (("a", "runs/a"), ("-a", "runs/-a")),
        (("1b", "runs/1b"), ("1b", "/scratch/1b")),
        (("1b", "/scratch/a/1b"), ("1b", "/scratch/b/1b")),
        (("", "a"), ("", "b")),
    ],
)
def test_two_runs_have_two_job_names(first: tuple[str, str], second: tuple[str, str]) -> None:
    """Jobs of one name wait for each other."""
    names = [job_name(*each) for each in (first, second)]
    assert names[0] != names[1] and all(0 < len(name) <= 60 and not name.startswith("-") for name in names)


@pytest.mark.parametrize("name", ["1b", "8b_16nodes", "a" * 60, "a.b-c"])
def test_a_name_that_slurm_takes_stays(name: str) -> None:
    assert job_name(name) == job_name(name, f"runs/{name}") == name


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1, max_size=20), field=st.sampled_from(("partition", "account", "qos", "gpu_type")))
@example(text="a\n#SBATCH --uid=0", field="partition")
@example(text="a --uid=0", field="account")
def test_a_directive_takes_one_word_or_is_refused(text: str, field: str) -> None:
    tree = {"gpus_per_node": 8, "cores_per_node": 96, field: text}
    try:
        cluster = validate_cluster(tree)
    except ConfigError as error:
        assert str(error).startswith(f"{field}: ")
        return
    without = render_evaluation("x", [], validate_cluster({**tree, field: None})).splitlines()
    lines = render_evaluation("x", [], cluster).splitlines()
    assert len(lines) == len(without) + (field != "gpu_type")
    assert text.split() == [text]


@pytest.mark.parametrize("field", ["name", "run_dir", "config"])
def test_a_job_refuses_line_breaks(field: str) -> None:
    values = {"name": "a", "run_dir": "a", "config": "a", "nodes": 1}
    with pytest.raises(ConfigError, match="one line of printable text"):
        Job(**{**values, field: "a\nb"})


def test_containers_and_restarts_have_their_own_errors() -> None:
    with pytest.raises(ConfigError, match=r"^container\.mounts: write 'a' as HOST:CONTAINER"):
        ContainerConfig(image="a", mounts=("a",))
    with pytest.raises(ConfigError, match=r"^restart\.backoff_s: must not be negative"):
        RestartConfig(backoff_s=-1)
