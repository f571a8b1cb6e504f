"""The engine is AdamW with clipping, no more: against torch in fp32, and its precision in bf16."""

import math

import pytest
import torch
from torch import Tensor, nn

from infini_train.config.attention import InfiniConfig
from infini_train.config.model import ModelConfig
from infini_train.config.parallel import ParallelConfig
from infini_train.config.training import OptimConfig
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer
from infini_train.parallel import device, mesh
from infini_train.train.optim import parameter_groups

OPTIM = OptimConfig(lr=3e-3, gate_lr=2e-2, weight_decay=0.1, clip_norm=0.5)
RATES = ({"matrices": 3e-3, "vectors": 3e-3, "gates": 2e-2}, {"matrices": 1e-3, "vectors": 2e-3, "gates": 5e-3})


@pytest.fixture(scope="module", autouse=True)
def groups() -> None:
    torch.set_num_threads(1)
    device.prepare()
    mesh.start()


def build_model() -> Transformer:
    config = ModelConfig(
        vocab_size=40,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=48,
        qkv_bias=True,
        attention=InfiniConfig(segment_tokens=8),
    )
    model = Transformer(config)
    initialise(model, config, 0)
    return model


def build_engine(model: nn.Module, precision: str = "fp32", zero_stage: int = 1):
    from infini_train.parallel.zero import Engine

    return Engine(
        model,
        model.named_parameters(),
        parameter_groups(model.named_parameters(), OPTIM),
        optim=OPTIM,
        parallel=ParallelConfig(zero_stage=zero_stage),
        precision=precision,
        micro_batch_lanes=2,
    )


def draw_inputs(model: Transformer, seed: int) -> tuple:
    tokens_BT = torch.randint(0, 40, (2, 33), generator=torch.Generator().manual_seed(seed))
    grid = model.make_grids(torch.zeros(2, 32, dtype=torch.bool), torch.ones(2, 32), None)
    return tokens_BT[:, :-1], grid, None, tokens_BT[:, 1:], torch.full((2, 32), 1 / 64)  # the mean loss


def test_deepspeed_takes_the_index_of_its_gpu_from_local_rank(monkeypatch):
    """`device.set_current` writes it there; tests/parallel/test_device.py."""
    from deepspeed.accelerator import get_accelerator

    asked: list[int] = []
    monkeypatch.setattr(get_accelerator(), "set_device", asked.append)
    monkeypatch.setenv("LOCAL_RANK", "5")
    build_engine(build_model()).close()
    assert asked and set(asked) == {5}


def test_steps_equal_torch_adamw_with_clipping():
    """Three micro-batches a step; the loss is scaled so that some steps are clipped and some are not."""
    model, plain = build_model(), build_model()
    engine = build_engine(model)
    adamw = torch.optim.AdamW(
        parameter_groups(plain.named_parameters(), OPTIM), betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps
    )
    clipped = []
    for step in range(6):
        rates = RATES[step % 2]
        for micro in range(3):
            inputs = draw_inputs(model, 10 * step + micro)
            scale = (1.0, 0.01)[step % 2]
            (engine(*inputs)[0] * scale).backward()
            (plain(*inputs)[0] * scale).backward()
        norm = engine.step(rates)
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), OPTIM.clip_norm).item()
        for group in adamw.param_groups:
            group["lr"] = rates[group["name"]]
        adamw.step()
        adamw.zero_grad()
        assert norm == pytest.approx(expected, rel=1e-5)
        clipped.append(norm > OPTIM.clip_norm)
    assert set(clipped) == {True, False}
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6, msg=name)
    assert engine.optimizer_steps() == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_cover_every_parameter_once(precision):
    model = build_model()
    engine = build_engine(model, precision)
    covered: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for shard in engine.shards():
        assert dict(model.named_parameters())[shard.name] is shard.parameter
        assert shard.values.dtype == torch.float32
        covered.setdefault((shard.kind, shard.name), []).append(
            (shard.flat_start, shard.flat_start + shard.values.numel())
        )
    expected = {
        (kind, name): [(0, parameter.numel())]
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name, parameter in model.named_parameters()
    }
    assert covered == expected


def train_steps(engine, model, steps: range) -> None:
    for step in steps:
        engine(*draw_inputs(model, step))[0].backward()
        engine.step(RATES[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_restored_elsewhere_go_on_the_same(precision):
    first, second = build_model(), build_model()
    engine, other = build_engine(first, precision), build_engine(second, precision)
    train_steps(engine, first, range(3))
    train_steps(other, second, range(50, 52))  # somewhere else entirely
    values = [shard.values.clone() for shard in engine.shards()]
    other.restore(zip(list(other.shards()), values, strict=True), engine.optimizer_steps())
    assert other.optimizer_steps() == 3
    train_steps(engine, first, range(3, 5))
    train_steps(other, second, range(3, 5))
    for (name, found), expected in zip(second.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_restored_moments_before_the_first_step_are_used():
    model = build_model()
    engine = build_engine(model)
    shards = list(engine.shards())
    filled = [torch.full_like(shard.values, 0.25) for shard in shards]
    engine.restore(zip(shards, filled, strict=True), 7)
    assert engine.optimizer_steps() == 7
    assert all((parameter == 0.25).all() for parameter in model.parameters())
    train_steps(engine, model, range(1))
    moments = [shard.values for shard in engine.shards() if shard.kind == "exp_avg"]
    assert all(values.mean().item() == pytest.approx(0.225, abs=0.05) for values in moments)  # beta1 x 0.25 and a bit
    assert engine.optimizer_steps() == 8


# ----------------------------------------------------------------------------------------------------------- precision


def test_bf16_weights_are_rounded_masters():
    model = build_model()
    engine = build_engine(model, "bf16")
    train_steps(engine, model, range(4))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    masters = {shard.name: shard.values for shard in engine.shards() if shard.kind == "master"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), masters[name].to(torch.bfloat16)), name
        finer = (masters[name] != parameter.flatten().float()).float().mean()
        assert finer > 0.5, f"{name}: masters keep what bf16 can't hold"


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bf16_masters_begin_as_the_weights_that_were_given(zero_stage):
    model = build_model()
    given = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = build_engine(model, "bf16", zero_stage)
    masters = {shard.name: shard.values for shard in engine.shards() if shard.kind == "master"}
    assert masters.keys() == given.keys()
    for name, values in given.items():
        assert torch.equal(masters[name], values.flatten()), name
    engine.close()


def test_bf16_follows_fp32():
    losses = {}
    for precision in ("fp32", "bf16"):
        model = build_model()
        engine = build_engine(model, precision)
        found = []
        for _ in range(12):
            loss = engine(*draw_inputs(model, 0))[0]
            loss.backward()
            engine.step(RATES[0])
            found.append(loss.item())
        losses[precision] = found
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.3
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)


class Scale(nn.Module):
    """loss = sum(weight x input): the gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def test_gradients_of_micro_batches_are_summed_in_fp32():
    """One large gradient and 64 small ones, each below half a bf16 step of the sum: in bf16 they would all be lost."""
    for precision in ("fp32", "bf16"):
        model = Scale()
        engine = build_engine(model, precision)
        dtype = next(model.parameters()).dtype
        for micro in range(65):
            value = 1.0 if micro == 0 else 2.0**-10
            (engine(torch.full((16, 16), value, dtype=dtype))).backward()
        norm = engine.step(RATES[0])
        assert norm == pytest.approx(16 * (1 + 64 * 2.0**-10), rel=1e-5), precision


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_with_bad_gradients_changes_nothing(precision, value):
    model = Scale()
    engine = build_engine(model, precision)
    dtype = next(model.parameters()).dtype
    (engine(torch.ones(16, 16, dtype=dtype))).backward()
    engine.step(RATES[0])
    before = [shard.values.clone() for shard in engine.shards()]
    bad = torch.ones(16, 16, dtype=dtype)
    bad[3, 3] = value
    (engine(bad)).backward()
    assert not math.isfinite(engine.step(RATES[0]))
    assert all(torch.equal(shard.values, old) for shard, old in zip(engine.shards(), before, strict=True))
    assert engine.optimizer_steps() == 1
    (engine(torch.ones(16, 16, dtype=dtype))).backward()
    assert engine.step(RATES[0]) == pytest.approx(16.0), "nothing of the bad gradients is left"


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)])
def test_a_skipped_step_leaves_nothing(precision, zero_stage):
    model = Scale()
    engine = build_engine(model, precision, zero_stage)
    ones = torch.ones(16, 16, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    engine(ones).backward()
    engine.step(RATES[0])
    before = [shard.values.clone() for shard in engine.shards()]
    engine(100 * ones).backward()
    engine.skip()
    assert all(torch.equal(shard.values, old) for shard, old in zip(engine.shards(), before, strict=True))
    assert engine.optimizer_steps() == 1
    engine(ones).backward()
    assert engine.step(RATES[0]) == pytest.approx(16.0), "nothing of the skipped gradients is left"
    engine.close()
