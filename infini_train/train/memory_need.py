"""Whether a model can fit into this rank's memory at all, asked before anything is allocated.

The kernel gives out more memory than there is, and kills a process that uses it: too large a model would end without a
word. What is counted here is less than training takes (infini_train/plan counts all), so nothing that fits is refused.
"""

from infini_train.config.errors import ConfigError
from infini_train.config.run import RunConfig
from infini_train.model.flops import count_parameters
from infini_train.parallel import device

FP32_BYTES, BF16_BYTES, MOMENTS = 4, 2, 2


def least_bytes(config: RunConfig) -> int:
    """Weights, moments and carried memories of a rank; `config` has its `parallel.data_size`."""
    parallel, train = config.parallel, config.train
    shards, replicas = parallel.tensor_size * parallel.pipeline_size, parallel.context_size * (parallel.data_size or 1)
    parameters = count_parameters(config.model) // shards
    weight_bytes = BF16_BYTES if train.precision == "bf16" else FP32_BYTES
    weights = parameters * weight_bytes
    if parallel.zero_stage == 3:
        weights //= replicas
    has_frozen = any(not rule.train for rule in config.optim.rules)  # how many is not known here
    moments = 0 if parallel.offload_optimizer or has_frozen else parameters * MOMENTS * FP32_BYTES // replicas
    lane = sum(layer.least_carried_bytes(config.model.shape, weight_bytes) for layer in config.model.layers) // shards
    return weights + moments + (lane * config.lanes_per_rank if train.carry_memory else 0)


def require_memory(config: RunConfig) -> None:
    """Refuses what can't fit.

    Raises:
        ConfigError: it can't.
    """
    needed, there = least_bytes(config), device.memory_bytes()
    if needed > there:
        raise ConfigError(
            f"model: {count_parameters(config.model):,} parameters and {config.lanes_per_rank} lanes' memories need"
            f" more than {needed / 1e9:,.0f} GB on each rank, which has {there / 1e9:,.1f} GB; choose smaller sizes or"
            " more ranks (infini-train plan shows what fits)"
        )
