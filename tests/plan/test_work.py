"""What the rehearsal counts on the meta device against a real layer: products and what autograd keeps, exactly."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from infini_train.config.files import validate
from infini_train.config.run import RunConfig
from infini_train.model.flops import forward_flops_per_token, training_flops_per_token
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer
from infini_train.ops import chunked_loss
from infini_train.parallel import device, mesh
from infini_train.plan import rehearsal
from infini_train.plan.rehearsal import find_costs

ATTENTION = "_scaled_dot_product"
UNCOUNTED = ("_unsafe_view", "mm", "t", "detach", "empty_like")  # products are operations, the others move nothing
MEMORIZING = {"kind": "memorizing", "cache_tokens": 64, "stored_tokens": 512, "top_k": 8, "layer": 0}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"kind": "infini"}, "fp32"),
    ({"kind": "infini"}, "bf16"),
    ({"kind": "infini", "update": "delta"}, "fp32"),
    ({"kind": "infini", "overlap_tokens": 8}, "bf16"),
    ({"kind": "infini", "conv_tokens": 3}, "bf16"),
    ({"kind": "infini", "conv_tokens": 3, "features": "sharp"}, "fp32"),
    ({"kind": "local", "overlap_tokens": 8}, "fp32"),
    ({"kind": "transformer_xl", "cache_tokens": 64}, "bf16"),
    (MEMORIZING, "fp32"),
    ({"kind": "full"}, "bf16"),
]


@pytest.fixture(scope="module", autouse=True)
def real_groups() -> Iterator[None]:
    """A rehearsal leaves the groups that other tests of this process may have joined."""
    device.prepare()
    yield
    mesh.start()


class Counter(TorchDispatchMode):
    """Operations of products, and bytes and number of all other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        if func._overloadpacket in flop_registry and not name.startswith(ATTENTION):
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        self.launches += not is_view and name not in ("_unsafe_view", "detach")
        if not (is_view or name in UNCOUNTED or name.startswith(ATTENTION)):
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
            self.moved += sum(each.nbytes for each in tensors)
        return out


def make_config(attention: dict[str, Any], precision: str, lanes: int = 2, **sections: Any) -> RunConfig:
    segment = {} if attention["kind"] == "full" else {"segment_tokens": 64}
    shape = {"vocab_size": 96, "hidden_size": 128, "num_layers": 1, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
    return validate(
        {
            "model": {**shape, "ffn_size": 320, "attention": {**attention, **segment}},
            "data": {"train": "-"},
            "train": {"window_tokens": 256, "batch_lanes": lanes, "max_steps": 1, "precision": precision},
            "optim": {"warmup_steps": 0},
            **sections,
        }
    )


def run_layer(config: RunConfig, lanes: int) -> tuple[Counter, Counter, int]:
    """Counters of forward and backward of a real layer, and the bytes that autograd kept in between.

    What only the next state needs is no part of them, nor what the state before has.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    mesh.start()
    model = Transformer(config.model)
    initialise(model, config.model, 0)
    model.to(dtype)
    starts_BT = torch.zeros(lanes, 256, dtype=torch.bool)
    starts_BT[:, 33] = True
    state = model.initial_state(lanes)
    grids = model.make_grids(starts_BT, torch.ones(lanes, 256), state)
    leaves = [each for each in tree_leaves((grids, state)) if isinstance(each, torch.Tensor)]
    known = [*model.parameters(), *leaves]
    others = {each.untyped_storage().data_ptr() for each in known}
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            saved[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return tensor

    forward, backward = Counter(), Counter()
    hidden_TBD = torch.randn(256, lanes, 128, dtype=dtype, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), forward:
        out_TBD = model.layers["0"](hidden_TBD, None if state is None else state[0], grids.grids[0])[0]
    kept = sum(size for storage, size in saved.values() if storage() is not None)
    gradient = torch.ones_like(out_TBD)
    with backward:
        out_TBD.backward(gradient)
    return forward, backward, kept


@pytest.mark.parametrize(("attention", "precision"), CASES)
def test_a_layers_work_is_what_it_does(attention: dict[str, Any], precision: str) -> None:
    config = make_config(attention, precision)
    forward, backward, kept = run_layer(config, 2)
    found = find_costs(config, on_cuda=False).layers[0]
    assert (found.forward.matmul_flops, found.backward.matmul_flops) == (forward.flops, backward.flops)
    assert found.kept_bytes == kept
    for planned, counted in ((found.forward, forward), (found.backward, backward)):
        assert planned.moved_bytes == pytest.approx(counted.moved, rel=0.05)
        assert planned.launches == pytest.approx(counted.launches, abs=4)


def test_more_lanes_are_extrapolated() -> None:
    config = make_config({"kind": "infini", "update": "delta"}, "fp32", lanes=5)
    forward, backward, kept = run_layer(config, 5)
    found = find_costs(config, on_cuda=False).layers[0]
    assert (found.forward.matmul_flops, found.backward.matmul_flops) == (forward.flops, backward.flops)
    assert found.kept_bytes == kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_head_is_counted_chunk_by_chunk(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven chunks, the last of 32 tokens, extrapolated from a few, against all of them counted."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4)
    monkeypatch.setattr(chunked_loss, "LEAST_TOKENS", 240)
    many = find_costs(make_config({"kind": "local"}, precision, lanes=10), False).head
    monkeypatch.setattr(rehearsal, "DIRECT_CHUNKS", 100)
    rehearsal._extrapolate.cache_clear()
    direct = find_costs(make_config({"kind": "local"}, precision, lanes=10), False).head
    rehearsal._extrapolate.cache_clear()
    tokens, width, rows = 10 * 256, 128, 96
    assert many.forward.matmul_flops == pytest.approx(3 * 2 * tokens * width * rows)  # gradients come with the logits
    assert many.backward.matmul_flops == 0
    for name in ("forward", "backward"):
        found, expected = getattr(many, name), getattr(direct, name)
        assert found.moved_bytes == pytest.approx(expected.moved_bytes)
        assert found.launches == pytest.approx(expected.launches)
    assert many.kept_bytes == pytest.approx(direct.kept_bytes)
    assert many.working_bytes == pytest.approx(direct.working_bytes)


def test_recomputation_stops_at_the_last_tensor_that_is_needed(monkeypatch) -> None:
    """The last product, its sum over tensor-parallel ranks, and the residual after it are not computed again."""
    monkeypatch.setattr("torch.nn.functional.linear", torch._C._nn.linear)  # a ZeRO-3 engine leaves its own behind
    rehearsal._extrapolate.cache_clear()
    config = make_config({"kind": "local"}, "fp32", parallel={"tensor_size": 2, "data_size": 1})
    found = find_costs(config, on_cuda=False).layers[0]
    sums = ("tensor", "all-reduce")
    assert (found.forward.exchanges[sums].calls, found.again.exchanges[sums].calls) == (2, 1)
    tokens, model = config.train.window_tokens * config.micro_lanes, config.model
    last_product = 2 * tokens * model.hidden_size * model.ffn_size // 2
    assert found.again.matmul_flops == found.forward.matmul_flops - last_product
    assert found.again.launches == found.forward.launches - 2


def test_a_recurrent_stack_calls_its_layers_for_each_segment() -> None:
    """Four segments of 64 tokens, each between memory tokens: [memory, tokens, memory]."""
    config = make_config({"kind": "rmt", "memory_tokens": 8}, "fp32")
    costs = find_costs(config, on_cuda=True)
    places = 2 * 4 * (8 + 64 + 8)
    heads = 128 * 16 * (8 + 2 + 2 + 8)
    assert costs.layers[0].forward.matmul_flops == 2 * places * (heads + 3 * 128 * 320)
    assert costs.layers[0].forward.attention_flops == {80: 2 * places * 80 * 8 * 2 * 16}
    assert costs.stack.forward.moved_bytes > 0  # memory is put before and after each segment
    assert find_costs(make_config({"kind": "local"}, "fp32"), on_cuda=True).stack.forward.moved_bytes == 0


def test_useful_operations_have_their_parts() -> None:
    for attention in ({"kind": "infini"}, {"kind": "infini", "update": "delta"}, {"kind": "local"}, {"kind": "full"}):
        model = make_config(attention, "fp32").model
        parts = forward_flops_per_token(model, 256)
        assert training_flops_per_token(model, 256) == 3 * sum(parts)
        assert (parts.memory_read > 0) == (attention["kind"] == "infini")
        assert (parts.delta > 0) == ("update" in attention)
