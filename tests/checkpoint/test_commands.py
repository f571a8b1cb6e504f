"""infini-train checkpoint: inspect, verify, reshard."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infini_train.checkpoint.fragments import Fragment, whole_fragment
from infini_train.checkpoint.index import dump_index, parse_index
from infini_train.checkpoint.reader import Checkpoint, open_checkpoint
from infini_train.checkpoint.resharding import reshard
from infini_train.checkpoint.store import find_latest, save
from infini_train.cli import main

WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
MEMORY = torch.arange(12, dtype=torch.float32).reshape(2, 2, 3) / 7
LAYOUT = {"tensor_size": 2, "sequence_parallel": False, "pipeline_size": 1, "zero_stage": 1}


def fragments() -> list[Fragment]:
    """A matrix in two tensor-parallel halves with its moments, a norm, the memory of two lanes, a counter."""
    halves = [
        Fragment("layers.0.w", kind, (4, 6), (0, first), (4, 3), 0, sign * WEIGHT[:, first : first + 3].reshape(-1))
        for kind, sign in (("master", 1), ("exp_avg", -1))
        for first in (0, 3)
    ]
    return [
        *halves,
        whole_fragment("norm", "master", torch.ones(6)),
        whole_fragment("norm", "exp_avg", torch.zeros(6)),
        whole_fragment("layers.0.memory", "carry", MEMORY),
        whole_fragment("layers.0.count", "carry", torch.tensor([3, 4])),
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 10 and 20."""
    for step in (10, 20):
        state = {"tokens": 1234 * step, "lanes": {"cursor": step}}
        save(tmp_path / "run", step, fragments(), state, {"name": "run", "parallel": LAYOUT})
    return tmp_path / "run"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, output and errors of `infini-train checkpoint ...`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code: Any = 0
        try:
            main(["checkpoint", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code or 0, said.out, said.err

    return run


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def values_of(checkpoint: Checkpoint, name: str, kind: str) -> torch.Tensor:
    ((piece, values),) = checkpoint.read([checkpoint.whole(name, kind)])
    return values.view(piece.global_shape)


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_the_newest_checkpoint(run_dir, call):
    code, out, err = call("inspect", run_dir)
    assert (code, err) == (0, "")
    blocks = out.split("\n\n")
    assert blocks[0].splitlines()[0] == str(folder(run_dir, 20))
    facts = dict(line.strip().split("  ", 1) for line in blocks[0].splitlines()[1:])
    assert {key: value.strip() for key, value in facts.items() if key != "files"} == {
        "step": "20",
        "tokens": "24,680",
        "written by": "1 process",
        "layout of the run": "tensor_size 2, sequence_parallel False, pipeline_size 1, zero_stage 1",
        "fragments": "8",
    }
    assert blocks[1].split()[:3] == ["file", "size", "rank-00000.safetensors"]
    assert [line.split() for line in blocks[2].splitlines()] == [
        ["kind", "tensors", "elements", "size"],
        ["master", "2", "30", "120", "bytes"],
        ["exp_avg", "2", "30", "120", "bytes"],
        ["carry", "2", "14", "64", "bytes"],
    ]
    assert [line.split("  ")[0] + ": " + line.split("  ")[-1].strip() for line in blocks[3].splitlines()] == [
        "tensor: kinds",
        "layers.0.w: float32: master, exp_avg",
        "norm: float32: master, exp_avg",
        "layers.0.memory: float32: carry",
        "layers.0.count: int64: carry",
    ]
    assert "layers.0.memory  2 x 2 x 3  float32" in blocks[3]


def test_inspect_as_json(run_dir, call):
    code, out, _ = call("inspect", folder(run_dir, 10), "--json")
    contents = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (contents["step"], contents["tokens"], contents["world_size"]) == (10, 12340, 1)
    assert contents["layout"] == LAYOUT and contents["fragments"] == 8
    (file,) = contents["files"]
    assert file["size_bytes"] == contents["size_bytes"] == (folder(run_dir, 10) / file["file"]).stat().st_size
    assert contents["kinds"]["exp_avg"] == {"tensors": 2, "elements": 30, "size_bytes": 120}
    first = {"name": "layers.0.w", "kind": "master", "shape": [4, 6], "dtype": "float32", "fragments": 2}
    assert contents["tensors"][0] == first and len(contents["tensors"]) == 6


def test_inspect_of_what_is_not_there(run_dir, call, tmp_path):
    assert call("inspect", tmp_path / "none")[::2] == (
        2,
        f"error: {tmp_path}/none: no such folder; give a checkpoint, or the folder of a run that has saved one\n",
    )
    (folder(run_dir, 20) / "index.json").write_text("{")
    code, out, err = call("inspect", run_dir)
    assert (code, out) == (2, "")
    assert err == f"error: {folder(run_dir, 20)}: index.json is torn or corrupt (not valid JSON)\n"


def test_commands_start_without_the_training_libraries(run_dir, tmp_path):
    code = (
        "import sys; from infini_train.cli import main\n"
        f"for command in (['inspect'], ['verify'], ['reshard', {str(tmp_path / 'new')!r}]):\n"
        f"    main(['checkpoint', command[0], {str(run_dir)!r}, *command[1:]])\n"
        "print(sorted({'deepspeed', 'megatron', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_says_ok_of_each_checkpoint(run_dir, call):
    expected = [f"{folder(run_dir, step)}: OK" for step in (20, 10)]
    assert call("verify", run_dir) == (0, "\n".join([*expected, ""]), "")
    assert call("verify", folder(run_dir, 10)) == (0, f"{expected[1]}\n", "")


def test_verify_names_every_damaged_file(run_dir, call):
    flip_last_byte(folder(run_dir, 10) / "rank-00000.safetensors")
    (folder(run_dir, 20) / "rank-00000.safetensors").unlink()
    code, out, err = call("verify", run_dir)
    assert code == 2
    assert out.splitlines() == [
        f"{folder(run_dir, 20)}: rank-00000.safetensors is missing",
        f"{folder(run_dir, 10)}: rank-00000.safetensors is corrupt (its sha256 differs)",
    ]
    assert err == f"error: {run_dir}: 2 problems; restore the files from a copy, or delete the damaged checkpoint\n"


def test_verify_of_a_run_finds_that_the_latest_is_gone(run_dir, call, tmp_path):
    folder(run_dir, 20).rename(tmp_path / "elsewhere")
    code, out, err = call("verify", run_dir)
    assert (code, err.count("\n")) == (2, 1) and ": 1 problem;" in err
    assert out.splitlines() == [
        f"{run_dir}/checkpoints/latest: names step-00000020, which is missing",
        f"{folder(run_dir, 10)}: OK",
    ]


def edit_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """An index that another program wrote: wrong, but with the right checksum."""
    index = parse_index((path / "index.json").read_text())
    change(vars(index))
    (path / "index.json").write_text(dump_index(index))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda index: index.update(fragments=index["fragments"][1:]),
            "layers.0.w (master): 12 of 24 elements are missing in the checkpoint",
        ),
        (
            lambda index: index.update(fragments=(*index["fragments"], index["fragments"][0])),
            "layers.0.w (master): stored twice, from element [0, 0] on",
        ),
        (
            lambda index: vars(index["fragments"][4]).update(key="other"),
            "rank-00000.safetensors does not hold other as 6 elements of float32",
        ),
        (
            lambda index: vars(index["fragments"][4]).update(dtype="bfloat16"),
            "rank-00000.safetensors does not hold master/norm as 6 elements of bfloat16",
        ),
    ],
    ids=["a gap", "an overlap", "no such tensor", "another dtype"],
)
def test_verify_finds_what_hashes_can_not(run_dir, call, change, problem):
    path = folder(run_dir, 20)
    edit_index(path, change)
    code, out, _ = call("verify", path)
    assert (code, out) == (2, f"{path}: {problem}\n")


def test_verify_finds_what_is_no_safetensors_file(run_dir, call):
    path = folder(run_dir, 20)
    content = b"nonsense" * 40
    (path / "rank-00000.safetensors").write_bytes(content)
    facts = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_index(path, lambda index: vars(index["files"][0]).update(facts))
    code, out, _ = call("verify", path)
    assert code == 2 and out.startswith(f"{path}: rank-00000.safetensors is not a safetensors file (")


# ------------------------------------------------------------------------------------------------------------- reshard


def test_reshard_writes_a_checkpoint_that_a_run_finds(run_dir, call, tmp_path):
    out = folder(tmp_path / "copy", 20)
    assert call("reshard", run_dir, out) == (0, f"{out}: step 20, written as whole tensors\n", "")
    assert call("verify", tmp_path / "copy")[:2] == (0, f"{out}: OK\n")
    old, new = open_checkpoint(folder(run_dir, 20)), find_latest(tmp_path / "copy", pytest.fail)
    assert new is not None
    assert (new.step, new.state, new.config) == (20, old.state, old.config)
    assert len(new.index.fragments) == 6 and all(e.shape == e.global_shape for e in new.index.fragments)
    for kind in ("master", "exp_avg", "carry"):
        assert new.names(kind) == old.names(kind)
        for name in new.names(kind):
            assert torch.equal(values_of(new, name, kind), values_of(old, name, kind))
    assert torch.equal(values_of(new, "layers.0.w", "master"), WEIGHT)
    assert sorted(path.name for path in out.parent.iterdir()) == ["step-00000020"]


def test_reshard_converts_weights_and_moments_but_not_the_memory(run_dir, call, tmp_path):
    assert call("reshard", run_dir, tmp_path / "half", "--dtype", "bf16")[0] == 0
    half = open_checkpoint(tmp_path / "half")
    assert torch.equal(values_of(half, "layers.0.w", "exp_avg"), -WEIGHT.to(torch.bfloat16))
    assert torch.equal(values_of(half, "layers.0.memory", "carry"), MEMORY)
    assert torch.equal(values_of(half, "layers.0.count", "carry"), torch.tensor([3, 4]))
    assert call("reshard", tmp_path / "half", tmp_path / "back", "--dtype", "fp32")[0] == 0
    back = open_checkpoint(tmp_path / "back")
    assert torch.equal(values_of(back, "layers.0.w", "master"), WEIGHT.to(torch.bfloat16).float())


def test_reshard_keeps_what_is_asked_for(run_dir, call, tmp_path):
    kinds = {"weights": ("--weights-only",), "some": ("--kinds", "exp_avg", "carry")}
    for name, options in kinds.items():
        assert call("reshard", run_dir, tmp_path / name, *options)[0] == 0
    for name, expected in (("weights", {"master"}), ("some", {"exp_avg", "carry"})):
        found = open_checkpoint(tmp_path / name)
        assert {entry.kind for entry in found.index.fragments} == expected
    assert call("reshard", tmp_path / "weights", tmp_path / "x", "--kinds", "carry") == (
        2,
        "",
        f"error: {tmp_path}/weights: holds no carry; its kinds are master\n",
    )
    code, _, err = call("reshard", run_dir, tmp_path / "x", "--weights-only", "--kinds", "carry")
    assert code == 2 and "not allowed with" in err
    assert not (tmp_path / "x").exists()


def test_reshard_spreads_over_files(run_dir, call, tmp_path):
    assert call("reshard", run_dir, tmp_path / "new", "--max-file-gb", "1e-7")[0] == 0  # 100 bytes
    found = open_checkpoint(tmp_path / "new")
    names = ["rank-00000.safetensors", *(f"rank-00000.{number:04d}.safetensors" for number in (1, 2, 3))]
    assert [file.file for file in found.index.files] == names
    assert call("reshard", run_dir, tmp_path / "x", "--max-file-gb", "0")[0] == 2


def test_reshard_refuses_to_replace_or_to_read_damage(run_dir, call, tmp_path):
    for existing in (run_dir, folder(run_dir, 10)):
        code, out, err = call("reshard", run_dir, existing)
        assert (code, out, err) == (2, "", f"error: {existing}: exists already; name a new folder\n")
    flip_last_byte(folder(run_dir, 20) / "rank-00000.safetensors")
    code, _, err = call("reshard", run_dir, tmp_path / "new")
    assert code == 2 and err.endswith("rank-00000.safetensors is corrupt (its sha256 differs)\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_reshard_leaves_nothing_half_written(run_dir, call, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, _, err = call("reshard", run_dir, tmp_path / "file" / "new")
    problem = "file exists; the checkpoint of step 20 was not written"
    assert (code, err) == (2, f"error: {tmp_path}/file/new: {problem}\n")
    (tmp_path / ".new.tmp-reshard").mkdir()
    (tmp_path / ".new.tmp-reshard" / "index.json").write_text("of a killed process")

    def interrupt(numel: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(open_checkpoint(folder(run_dir, 20)), tmp_path / "new", on_tensor=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
    assert call("reshard", run_dir, tmp_path / "new")[0] == 0
    assert call("verify", tmp_path / "new")[0] == 0
