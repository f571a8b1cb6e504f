"""Saving with one rank and with several, finding, falling back, retention."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infini_train.checkpoint.fragments import CheckpointError, Fragment, Wanted, whole_fragment
from infini_train.checkpoint.store import find_latest, find_step, open_checkpoint, prune, resolve, save, set_aside


def save_step(run_dir: Path, step: int, value: float | None = None) -> Path:
    fill = float(step) if value is None else value
    fragments = [whole_fragment("w", "weight", torch.full((50,), fill))]
    return save(run_dir, step, fragments, {"step": step}, {})


def steps_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def no_problem(line: str) -> None:
    pytest.fail(f"unexpected problem: {line}")


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def found(run_dir: Path) -> tuple[str, list[str]]:
    problems: list[str] = []
    checkpoint = find_latest(run_dir, problems.append)
    assert checkpoint is not None
    return checkpoint.path.name, problems


def test_layout_on_disk(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1234)
    assert path == tmp_path / "checkpoints" / "step-00001234"
    assert sorted(file.name for file in path.iterdir()) == ["index.json", "rank-00000.safetensors"]
    assert steps_of(tmp_path) == ["latest", "step-00001234"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00001234\n"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_step(tmp_path, 5, 1.0)
    path = save_step(tmp_path, 5, 2.0)
    checkpoint = open_checkpoint(path)
    ((_, tensor),) = checkpoint.read([checkpoint.whole("w", "weight")])
    assert torch.equal(tensor, torch.full((50,), 2.0))
    assert steps_of(tmp_path) == ["latest", "step-00000005"]


def test_leftovers_of_killed_processes_are_ignored_then_removed(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    for name in (".step-00000009.tmp-save", ".step-00000004.tmp-pruned"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "index.json").write_text("{")
    assert found(tmp_path) == ("step-00000005", [])
    save_step(tmp_path, 6)
    assert steps_of(tmp_path) == ["latest", "step-00000005", "step-00000006"]


def test_a_replacement_cut_short_leaves_the_old_one_usable(tmp_path: Path) -> None:
    path = save_step(tmp_path, 5)
    path.rename(path.with_name(".step-00000005.tmp-replaced"))  # killed before the new folder took the name
    assert found(tmp_path) == (".step-00000005.tmp-replaced", [])
    save_step(tmp_path, 6)
    assert steps_of(tmp_path) == ["latest", "step-00000005", "step-00000006"]


# ------------------------------------------------------------------------------------------------------- several ranks


def save_together(run_dir: Path, step: int, ranks: list[Iterable[Fragment]]) -> list[Path | Exception]:
    """All ranks in threads with a real barrier; each one's result or exception."""
    barrier = threading.Barrier(len(ranks), timeout=10)

    def one(rank: int) -> Path | Exception:
        options = {"rank": rank, "world_size": len(ranks), "barrier": lambda: barrier.wait() and None}
        try:
            return save(run_dir, step, ranks[rank], {"by": rank}, {}, **options)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, range(len(ranks))))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0, 1]), st.sampled_from([0, 1]), st.integers(1, 11), st.integers(1, 5))
def test_saved_at_one_layout_loaded_at_another(
    tmp_path_factory: pytest.TempPathFactory, stored_dim: int, wanted_dim: int, flat_cut: int, wanted_cut: int
) -> None:
    """Two tensor-parallel slices, the first cut flat over two ZeRO ranks; read as two other slices, each cut flat."""
    tensor = torch.randn(6, 8).to(torch.bfloat16)
    run_dir = tmp_path_factory.mktemp("run")
    low, high = (part.reshape(-1).contiguous() for part in tensor.chunk(2, stored_dim))
    shape = (3, 8) if stored_dim == 0 else (6, 4)
    start = (3, 0) if stored_dim == 0 else (0, 4)
    ranks: list[Iterable[Fragment]] = [
        [Fragment("w", "master", (6, 8), (0, 0), shape, 0, low[:flat_cut])],
        [Fragment("w", "master", (6, 8), (0, 0), shape, flat_cut, low[flat_cut:])],
        [Fragment("w", "master", (6, 8), start, shape, 0, high)],
    ]
    paths = save_together(run_dir, 3, ranks)
    assert paths == [run_dir / "checkpoints" / "step-00000003"] * 3
    checkpoint = open_checkpoint(run_dir / "checkpoints" / "step-00000003")
    assert checkpoint.state == {"by": 0}
    first = tensor.narrow(wanted_dim, 0, wanted_cut)
    second = tensor.narrow(wanted_dim, wanted_cut, tensor.shape[wanted_dim] - wanted_cut)
    for part, begin in ((first, 0), (second, wanted_cut)):
        place = (begin, 0) if wanted_dim == 0 else (0, begin)
        half = part.numel() // 2
        for flat, numel in ((0, half), (half, part.numel() - half)):
            ((_, got),) = checkpoint.read([Wanted("w", "master", (6, 8), place, tuple(part.shape), flat, numel)])
            assert torch.equal(got, part.reshape(-1)[flat : flat + numel])


def failing() -> Iterable[Fragment]:
    yield whole_fragment("b", "weight", torch.zeros(4))
    raise RuntimeError("the device was lost")


def test_a_rank_that_fails_fails_all_and_hangs_none(tmp_path: Path) -> None:
    good = [whole_fragment("a", "weight", torch.zeros(4))]
    assert save_together(tmp_path, 1, [good, []]) == [tmp_path / "checkpoints" / "step-00000001"] * 2
    for ranks, culprit in (([good, failing(), []], 1), ([failing(), good, []], 0)):
        results = save_together(tmp_path, 2, ranks)
        assert isinstance(results[culprit], RuntimeError)
        others = [str(result) for rank, result in enumerate(results) if rank != culprit]
        assert all("the checkpoint of step 2 was not written: " in line for line in others), others
        assert steps_of(tmp_path) == ["latest", "step-00000001"]
    results = save_together(tmp_path, 1, [failing(), good])  # the old one of this step is not taken for the new one
    assert all(isinstance(result, Exception) for result in results)
    assert found(tmp_path) == ("step-00000001", [])


def test_tensors_with_gaps_are_not_published(tmp_path: Path) -> None:
    half = Fragment("w", "weight", (8,), (0,), (4,), 0, torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"step 4 was not written: w \(weight\): 4 of 8 elements are missing"):
        save(tmp_path, 4, [half], {}, {})
    assert steps_of(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file, not a folder")
    with pytest.raises(
        CheckpointError, match=rf"^{tmp_path}/checkpoints: file exists; the checkpoint of step 1 was not w"
    ):
        save_step(tmp_path, 1)


def test_state_that_is_not_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, [], {"rng": torch.zeros(2)}, {})
    assert steps_of(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ finding, damage


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert find_latest(tmp_path, no_problem) is None
    (tmp_path / "checkpoints" / ".step-00000001.tmp-save").mkdir(parents=True)
    assert find_latest(tmp_path, no_problem) is None


def test_the_pointer_decides_then_the_highest_step(tmp_path: Path) -> None:
    for step in (10, 30, 20):  # 20 saved last: the run was resumed from 10
        save_step(tmp_path, step)
    assert found(tmp_path) == ("step-00000020", [])
    (tmp_path / "checkpoints" / "latest").unlink()
    assert found(tmp_path) == ("step-00000030", [])
    (tmp_path / "checkpoints" / "latest").write_text("nonsense\n")
    assert found(tmp_path) == ("step-00000030", [])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (flip_last_byte, "is corrupt (its sha256 differs)"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:100]), "is torn (100 bytes instead of "),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, damage: str, file: str
) -> None:
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    act, problem = DAMAGES[damage]
    act(newest / file)
    name, problems = found(tmp_path)
    assert name == "step-00000001"
    (line,) = problems
    assert line.startswith(f"{newest}: {file} is ") and line.endswith("; step-00000001 is used instead")
    assert problem in line or file == "index.json"


def test_a_damaged_checkpoint_that_was_set_aside_does_not_count_as_one_of_the_last(tmp_path: Path) -> None:
    """Else a good one would be pruned for it."""
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    flip_last_byte(newest / "rank-00000.safetensors")
    damaged: list[Path] = []
    used = find_latest(tmp_path, lambda line: None, damaged.append)
    assert damaged == [newest]
    assert set_aside(damaged, used) == [newest.with_name("damaged-step-00000002")]
    save_step(tmp_path, 3)
    prune(tmp_path, keep_last=2, milestone_every_steps=None)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*step-*"))
    assert names == ["damaged-step-00000002", "step-00000001", "step-00000003"]
    flip_last_byte(tmp_path / "checkpoints" / "step-00000003" / "rank-00000.safetensors")
    assert found(tmp_path)[0] == "step-00000001"


def test_a_deleted_newest_checkpoint_is_reported(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    newest.rename(tmp_path / "elsewhere")
    name, (line,) = found(tmp_path)
    assert name == "step-00000001"
    assert "latest: names step-00000002, which is missing; step-00000001 is used instead" in line


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_last_byte(save_step(tmp_path, step) / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"^no valid checkpoint: .*step-00000002: rank-00000.* is corrupt"):
        find_latest(tmp_path, no_problem)


def test_resolve_accepts_a_checkpoint_a_run_and_the_folder_between(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 2)
    assert {resolve(p) for p in (path, tmp_path, tmp_path / "checkpoints")} == {path}
    copy = tmp_path / "my-favourite"
    path.rename(copy)
    assert resolve(copy) == copy
    (tmp_path / "empty").mkdir()
    for name, problem in (("nowhere", "no such folder"), ("empty", "holds no checkpoint")):
        with pytest.raises(CheckpointError, match=rf"{name}: {problem}; give a checkpoint"):
            resolve(tmp_path / name)


def test_a_rank_finds_the_step_that_it_is_told(tmp_path: Path) -> None:
    path = save_step(tmp_path, 5)
    assert find_step(tmp_path, 5) == path
    replaced = path.rename(path.with_name(".step-00000005.tmp-replaced"))
    assert find_step(tmp_path, 5) == replaced
    with pytest.raises(CheckpointError, match=r"step 6 is not there for this rank; all ranks need the same run_dir$"):
        find_step(tmp_path, 6)


# ------------------------------------------------------------------------------------------------------------ retention


def test_prune_keeps_the_last_and_the_milestones(tmp_path: Path) -> None:
    for step in range(100, 800, 100):
        save_step(tmp_path, step)
    prune(tmp_path, 2, 300)
    assert steps_of(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (300, 600, 700))]
    prune(tmp_path, 1, None)
    assert steps_of(tmp_path) == ["latest", "step-00000700"]
    prune(tmp_path, 5, None)
    assert steps_of(tmp_path) == ["latest", "step-00000700"]


def test_prune_counts_back_from_the_latest_also_after_going_back(tmp_path: Path) -> None:
    for step in (100, 200, 900, 300):  # resumed from 200
        save_step(tmp_path, step)
    prune(tmp_path, 1, None)
    assert steps_of(tmp_path) == ["latest", "step-00000300", "step-00000900"]
    save_step(tmp_path, 1000)
    prune(tmp_path, 1, None)
    assert steps_of(tmp_path) == ["latest", "step-00001000"]


def test_prune_before_the_first_save(tmp_path: Path) -> None:
    prune(tmp_path, 1, None)
    assert list(tmp_path.iterdir()) == []
