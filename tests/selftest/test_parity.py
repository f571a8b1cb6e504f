"""The comparison passes what is equal, and finds and names what a wrong layout would do."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from infini_train.checkpoint import store
from infini_train.checkpoint.fragments import whole_fragment
from infini_train.model import layers
from infini_train.selftest.cases import OPTIM, STEPS
from infini_train.selftest.parity import TOLERANCES, compare_runs, relative_error

pytestmark = pytest.mark.usefixtures("process_groups")


def rewrite(source: Path, target: Path, step: int, kind: str, name: str, change) -> Path:
    """A copy of a run with one tensor of one checkpoint changed."""
    shutil.copytree(source, target)
    old = store.open_checkpoint(store.find_step(source, step))
    fragments = []
    for stored in dict.fromkeys((entry.kind, entry.name) for entry in old.index.fragments):
        ((piece, values),) = old.read([old.whole(stored[1], stored[0])])
        values = values.view(piece.global_shape)
        values = change(values.clone()) if stored == (kind, name) else values
        fragments.append(whole_fragment(stored[1], stored[0], values))
    store.save(target, step, fragments, old.state, old.config)
    return target


def test_a_run_equals_itself(run_one, reference) -> None:
    errors = compare_runs(run_one("again"), reference)
    assert errors.exceeding("fp32") == [] and all(worst.error == 0 for worst in errors)


def test_the_first_step_is_whole_and_later_ones_are_clipped(reference) -> None:
    norms = store.open_checkpoint(store.find_step(reference, STEPS)).state["grad_norms"]
    clipped = [norm > OPTIM.clip_norm for norm in norms]
    assert not clipped[0] and 1 <= sum(clipped) < STEPS


def test_the_first_moments_are_the_gradients(reference) -> None:
    first = store.open_checkpoint(store.find_step(reference, 1))
    moments = first.read(first.whole(name, "exp_avg") for name in first.names("exp_avg"))
    total = sum(values.double().square().sum().item() for _, values in moments)
    assert math.sqrt(total) / (1 - OPTIM.beta1) == pytest.approx(first.state["grad_norms"][0], rel=1e-5)


def test_a_missing_sum_over_tensor_ranks_is_found(run_one, reference, monkeypatch) -> None:
    """Under sequence parallelism a rank's gradient of a norm is that of its own tokens: here, of half of them."""

    def forward(self: layers.Norm, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:  # the norms of heads
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        mine, theirs = x.chunk(2)
        weights = self.weight, self.weight.detach()
        parts = zip((mine, theirs), weights, strict=True)
        return torch.cat([F.rms_norm(part, (x.shape[-1],), weight, self.eps) for part, weight in parts])

    monkeypatch.setattr(layers.Norm, "forward", forward)
    errors = compare_runs(run_one("unsummed"), reference)
    assert "norm" in errors.gradient.name and errors.gradient.error > 0.1
    assert {"gradient", "grad_norm", "loss", "parameter"} <= set(errors.exceeding("fp32"))
    assert "gradient" in errors.exceeding("bf16")


@pytest.mark.parametrize(
    ("step", "kind", "name", "field"),
    [
        (1, "exp_avg", "layers.2.attention.gate", "gradient"),
        (STEPS, "master", "norm_final.weight", "parameter"),
        (STEPS, "carry", "layers.3.memory.memory_BKDE", "memory"),
    ],
)
def test_one_wrong_tensor_is_found_and_named(step, kind, name, field, reference, tmp_path) -> None:
    wrong = rewrite(reference, tmp_path / "wrong", step, kind, name, lambda values: values * (1 + 1e-4))
    errors = compare_runs(wrong, reference)
    assert errors.exceeding("fp32") == [field]
    assert getattr(errors, field).name == name


def test_what_is_not_a_number_is_an_error() -> None:
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert relative_error(ones, ones) == relative_error(zeros, zeros) == 0
    assert relative_error(ones, zeros) == math.inf
    assert math.isnan(relative_error(ones * math.nan, ones))


def test_a_tensor_that_is_not_a_number_is_found(reference, tmp_path) -> None:
    name = store.open_checkpoint(store.find_step(reference, 1)).names("exp_avg")[0]
    wrong = rewrite(reference, tmp_path / "wrong", 1, "exp_avg", name, lambda values: values * math.nan)
    assert compare_runs(wrong, reference).gradient == (math.inf, name)


@pytest.mark.parametrize("attention", ["linear", "delta"])
def test_the_tolerance_of_bf16_is_its_own_distance_from_fp32(attention, run_one) -> None:
    """Neither so tight that rounding fails, nor so loose that a wrong layout passes."""
    errors = compare_runs(run_one("bf16", attention, "bf16"), run_one("fp32", attention))
    limits = TOLERANCES["bf16"]
    assert all(worst.error < limit / 1.5 for worst, limit in zip(errors, limits, strict=True))
    assert errors.gradient.error > limits.gradient / 6
