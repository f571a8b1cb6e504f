"""The plan against four real processes, byte by byte: engines are built, a window is run, their buffers measured."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infini_train.config.files import validate
from infini_train.config.run import RunConfig

WORLD = 4
SCALARS_BYTES = 64  # norms and counts, which no plan lists
MODEL = {
    "vocab_size": 2048,  # with 64 more than what ZeRO-3 keeps whole on every rank
    "hidden_size": 64,
    "num_layers": 5,  # uneven over stages
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 52,
    "qkv_bias": True,
    "qk_norm": True,
    "attention": {"kind": "infini", "segment_tokens": 8},
}
DELTA = {"kind": "infini", "segment_tokens": 8, "update": "delta", "overlap_tokens": 3}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # parallel, precision, changes to the model
    "tp2-cp2": ({"tensor_size": 2, "sequence_parallel": True, "context_size": 2}, "fp32", {}),
    "tp4": ({"tensor_size": 4}, "bf16", {"tied_embeddings": True}),  # fewer key-value heads than ranks
    "pp2-dp2": ({"pipeline_size": 2}, "bf16", {}),
    "pp2-virtual2-cp2": ({"pipeline_size": 2, "virtual_stages": 2, "context_size": 2}, "fp32", {"attention": DELTA}),
    "cp2-dp2-zero2": ({"context_size": 2, "zero_stage": 2}, "fp32", {"attention": DELTA}),
    "tp2-dp2-offload": ({"tensor_size": 2, "zero_stage": 2, "offload_optimizer": True}, "bf16", {}),
    "dp4-zero2-offload": ({"zero_stage": 2, "offload_optimizer": True}, "fp32", {}),
    "dp4-offload": ({"offload_optimizer": True}, "fp32", {}),
    "tp2-dp2-zero3": ({"tensor_size": 2, "zero_stage": 3}, "fp32", {}),
    "cp4-zero3-offload": ({"context_size": 4, "zero_stage": 3, "offload_optimizer": True}, "bf16", {"num_layers": 2}),
}


def make_config(name: str) -> RunConfig:
    parallel, precision, changes = CASES[name]
    data = WORLD // math.prod(parallel.get(f"{way}_size", 1) for way in ("tensor", "pipeline", "context"))
    return validate(
        {
            "model": {**MODEL, **changes},
            "data": {"train": "nowhere"},
            "train": {"window_tokens": 32, "batch_lanes": 2 * data, "micro_batch_lanes": 1, "max_steps": 1}
            | {"precision": precision},
            "optim": {"warmup_steps": 0},
            "parallel": {**parallel, "data_size": data},
        }
    )


# ----------------------------------------------------------------------------------------------------- in the processes


def build(config: RunConfig) -> tuple[Any, Any]:
    """Stages and engine, as a session builds them."""
    import torch

    from infini_train.model.init import initialise
    from infini_train.parallel import mesh
    from infini_train.parallel.pipeline import Stages
    from infini_train.parallel.zero import Engine
    from infini_train.train.optim import parameter_groups

    place = mesh.start(config.parallel)
    precision = config.train.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    stages = Stages(config.model, config.parallel, place, dtype=dtype)
    for stage in stages.transformers():
        initialise(stage, config.model, config.seed)
    engine = Engine(
        stages,
        stages.named_globally(),
        parameter_groups(stages.named_globally(), config.optim),
        optim=config.optim,
        parallel=config.parallel,
        precision=precision,
        micro_batch_lanes=config.micro_lanes,
    )
    return stages, engine


def train_window(config: RunConfig, stages: Any, engine: Any) -> Any:
    """Forward and backward of one window of every lane; the memory before it."""
    import numpy as np

    from infini_train.data.lanes import Batch
    from infini_train.parallel.pipeline import cut_micro_batches, run_window

    count = config.lanes_per_rank // config.micro_lanes
    shape = (config.lanes_per_rank, config.train.window_tokens)
    ids, starts = np.zeros(shape, np.int64), np.zeros(shape, bool)
    batch = Batch(ids, ids, starts, np.ones(shape, np.float32), np.zeros(shape[0], np.int64), 0.0)
    carried = stages.initial_carried(config.micro_lanes, count)
    run_window(stages, engine, cut_micro_batches(batch, count), carried, loss_scale=1.0)
    return carried


def record_calls() -> Any:
    """A torch mode whose `found` adds up the collectives of tensors, by kind: their number, and bytes of the whole."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    kinds = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
    kinds |= {"send": "send", "alltoall_base_": "send", "broadcast_": "send", "allgather_": "all-gather"}

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, list[int]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            space, name = func._schema.name.split("::")
            if space == "c10d":
                tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
                largest = max((each.nbytes for each in tensors), default=0)
                calls = self.found.setdefault(kinds.get(name, name), [0, 0])
                calls[0] += largest > SCALARS_BYTES
                calls[1] += largest if largest > SCALARS_BYTES else 0
            return func(*args, **(kwargs or {}))

    return Calls()


def count_all(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def measure_gradients(zero: Any, engine: Any, parameters: list[Any]) -> tuple[int, int]:
    """Bytes of what adds up until the step, and of the masters' own gradients."""
    sums = [parameter.grad for parameter in parameters]
    if engine.stage == 3:
        sums = [zero.grad_partitions_flat_buffer]
    elif engine.stage == 2:
        sums = [buffer for group in zero.averaged_gradients.values() for buffer in group or ()]
        sums += [gradient for group in zero.all_grad_tensors.values() for gradient in group or ()]
        sums += list(getattr(zero, "accumulated_grads_in_cpu", {}).values())
    return count_all(sums), count_all(flat.grad for flat in engine._flat_groups())


def measure(config: RunConfig) -> dict[str, Any]:
    """What one rank really holds."""
    from infini_train.model.slices import find_slice
    from infini_train.ops.state import name_leaves
    from infini_train.train.carry import Lanes, carry_fragments

    stages, engine = build(config)
    calls = record_calls()
    with calls:
        carried = train_window(config, stages, engine)
    parameters, zero = [parameter for _, parameter in stages.named_globally()], engine._zero
    gradients, masters_gradients = measure_gradients(zero, engine, parameters)
    ranks = next(iter(stages.transformers()[0].layers.values())).attention.ranks
    sent_bytes = 0 if ranks is None else ranks.sent_bytes
    with calls:
        engine.step({"matrices": 1e-3, "vectors": 1e-3, "gates": 1e-3})
    flats = engine._flat_groups()
    if engine.stage == 3:
        weights = count_all(parameter.ds_tensor for parameter in parameters) + count_all(parameters)
    else:
        weights = count_all(zero.bit16_groups_flat)
    fragments = carry_fragments(stages, carried, Lanes.of(config, stages.place.data[0]))
    owned = [shard.values for shard in engine.shards() if find_slice(shard.parameter).owned]
    states = [layer for of_stage in carried for state in of_stage for layer in state or ()]
    leaves = [leaf.tensor for state in states for leaf in name_leaves(state, "")]
    moments = [engine._adam_state(flat)[kind] for flat in flats for kind in ("exp_avg", "exp_avg_sq")]
    return {
        "place": [list(pair) for pair in stages.place],
        "parameters": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters),
        "weights": weights,
        "gradients": gradients,
        "masters_gradients": masters_gradients,
        "masters": count_all(flats),
        "moments": count_all(moments),
        "carried": count_all(leaves),
        "sent": sent_bytes,
        "collectives": calls.found,
        "checkpoint": count_all(owned) + count_all(fragment.tensor for fragment in fragments),
    }


def serve(rank: int, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_PORT": str(port)}
    found = {name: measure(make_config(name)) for name in CASES}
    (out / f"{rank}.json").write_text(json.dumps(found))


def main(out: Path) -> None:
    """Four ranks, forked after torch, megatron-core and DeepSpeed were imported once."""
    from infini_train.parallel import device

    device.prepare()
    import torch

    import infini_train.parallel.zero
    import infini_train.train.carry  # noqa: F401

    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    rank = next((rank for rank in range(1, WORLD) if os.fork() == 0), 0)
    serve(rank, port, out)
    if rank == 0:
        assert all(os.wait()[1] == 0 for _ in range(1, WORLD))
    os._exit(0)


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("processes")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-W", "ignore", __file__, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: [rank[name] for rank in ranks] for name in CASES}


@pytest.fixture(scope="module", autouse=True)
def real_groups() -> Iterator[None]:
    """A dry run leaves the groups that other tests of this process may have joined."""
    yield
    from infini_train.parallel import mesh

    mesh.start()


def check_traffic(config: RunConfig, found: dict[str, list[int]], rank: Any) -> None:
    """Bytes of all buffers by kind. DeepSpeed also calls its reduction for a single rank, where nothing is sent."""
    planned: dict[str, float] = {}
    for each in rank.collectives:
        planned[each.kind] = planned.get(each.kind, 0.0) + each.buffer_bytes
    if rank.place.data[1] * rank.place.context[1] == 1:
        planned["all-reduce"] += rank.micro_batches * rank.parameters * (2 if config.train.precision == "bf16" else 4)
    divided_weights = config.parallel.zero_stage == 3  # small ones stay whole, others are still there for the backward
    for kind, planned_bytes in planned.items():
        allowed = 0.3 if divided_weights and kind == "all-gather" else 0.02
        assert planned_bytes == pytest.approx(found[kind][1], rel=allowed), kind


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_processes_hold(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    from infini_train.plan.dry_run import dry_run

    config = make_config(name)
    plan = dry_run(config, ranks=range(WORLD))
    assert plan.world_size == WORLD
    for found, rank in zip(measured[name], plan.ranks, strict=True):
        check_traffic(config, found.pop("collectives"), rank)
        layers = sum(stop - first for first, stop in rank.layers)
        host = config.parallel.offload_optimizer
        states = rank.host if host else rank.device
        assert found == {
            "place": [list(pair) for pair in rank.place],
            "parameters": rank.parameters,
            "weights": rank.device.weights,
            "gradients": rank.device.gradients + rank.host.gradients - (states.masters if host else 0),
            "masters_gradients": states.masters if host else 0,
            "masters": states.masters,
            "moments": states.moments,
            "carried": rank.carried_bytes,
            "sent": layers * config.lanes_per_rank * sum(rank.sent_bytes),
            "checkpoint": rank.checkpoint_bytes,
        }
    assert sum(rank["checkpoint"] for rank in measured[name]) == plan.checkpoint_bytes
    assert dataclasses.replace(plan, ranks=()) == dry_run(config, ranks=())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
