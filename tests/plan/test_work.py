"""Closed forms of work and activations against a real layer: products and what autograd saves, exactly."""

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
from infini_train.parallel import mesh
from infini_train.plan import activations, work

ATTENTION = "_scaled_dot_product"
UNCOUNTED = ("_unsafe_view", "mm", "t", "detach", "empty_like")  # products are operations, the others move nothing
CASES = [
    ({"kind": "infini"}, "fp32"),
    ({"kind": "infini"}, "bf16"),
    ({"kind": "infini", "update": "delta"}, "fp32"),
    ({"kind": "infini", "overlap_tokens": 8}, "bf16"),
    ({"kind": "local", "overlap_tokens": 8}, "fp32"),
    ({"kind": "full"}, "bf16"),
]


@pytest.fixture(scope="module", autouse=True)
def groups() -> None:
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


def make_config(attention: dict[str, Any], precision: str) -> RunConfig:
    segment = {} if attention["kind"] == "full" else {"segment_tokens": 64}
    shape = {"vocab_size": 96, "hidden_size": 128, "num_layers": 1, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
    return validate(
        {
            "model": {**shape, "ffn_size": 320, "attention": {**attention, **segment}},
            "data": {"train": "-"},
            "train": {"window_tokens": 256, "batch_lanes": 2, "max_steps": 1, "precision": precision},
            "optim": {"warmup_steps": 0},
        }
    )


def run_layer(config: RunConfig) -> tuple[Counter, Counter, int]:
    """Counters of forward and backward of a real layer, and the bytes that autograd saved in between."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = Transformer(config.model)
    initialise(model, config.model, 0)
    model.to(dtype)
    starts_BT = torch.zeros(2, 256, dtype=torch.bool)
    starts_BT[:, 33] = True
    state = model.initial_state(2)
    grid = model.make_grids(starts_BT, torch.ones(2, 256), state)
    known = [*model.parameters(), *(each for each in grid if isinstance(each, torch.Tensor))]
    others = {each.untyped_storage().data_ptr() for each in known}
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in others:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    forward, backward = Counter(), Counter()
    hidden_TBD = torch.randn(256, 2, 128, dtype=dtype, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), forward:
        out_TBD, _ = model.layers["0"](hidden_TBD, None if state is None else state[0], grid)
    kept = sum(each.untyped_storage().nbytes() for each in saved.values())
    gradient = torch.ones_like(out_TBD)
    with backward:
        out_TBD.backward(gradient)
    return forward, backward, kept


@pytest.mark.parametrize(("attention", "precision"), CASES)
def test_a_layers_work_is_what_it_does(attention: dict[str, Any], precision: str) -> None:
    config = make_config(attention, precision)
    shapes = work.find_shapes(config, fused_norm=False)
    forward, backward, kept = run_layer(config)
    planned_forward, planned_backward = work.layer_work(shapes)
    assert planned_backward.matmul_flops == pytest.approx(backward.flops, rel=0.002)  # the first state has no gradient
    exact = "delta" not in attention.get("update", "")  # its chain's first factor is one of the carried states
    assert planned_forward.matmul_flops == (forward.flops if exact else pytest.approx(forward.flops, rel=0.001))
    assert activations.layer_kept(shapes) == (kept if exact else pytest.approx(kept, rel=0.01))
    for planned, counted in ((planned_forward, forward), (planned_backward, backward)):
        assert planned.moved_bytes == pytest.approx(counted.moved, rel=0.12)
        assert planned.launches == pytest.approx(counted.launches, rel=0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_convolution_keeps(precision: str) -> None:
    config = make_config({"kind": "infini", "conv_tokens": 3}, precision)
    shapes = work.find_shapes(config, fused_norm=False)
    assert activations.layer_kept(shapes) == run_layer(config)[2]


def test_useful_operations_have_their_parts() -> None:
    for attention in ({"kind": "infini"}, {"kind": "infini", "update": "delta"}, {"kind": "local"}, {"kind": "full"}):
        model = make_config(attention, "fp32").model
        parts = forward_flops_per_token(model, 256)
        assert training_flops_per_token(model, 256) == 3 * sum(parts)
        assert (parts.memory_read > 0) == (attention["kind"] == "infini")
        assert (parts.delta > 0) == ("update" in attention)
