"""A rank's part of the model from the config alone: its stages and the sizes of its parameters, without modules.

For the search, which looks at hundreds of layouts. tests/plan/test_search.py compares it with the modules.
"""

from dataclasses import dataclass

from infini_train.config.attention import InfiniConfig
from infini_train.config.run import RunConfig
from infini_train.model.stages import Stage, find_stages
from infini_train.plan.states import StateBytes, count_bytes, divide_states, effective_stage


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the ranks of one pipeline stage have.

    Attributes:
        pipeline_rank: where it stands.
        stages: of this rank, more than one under the interleaved schedule.
        parameters: elements of the rank, copies that other ranks hold too included.
        device, host: between the last backward and the step.
        partition: elements of the optimizer states that lie here.
        largest_group: elements of the largest group of parameters there.
        largest_parameter: elements.
        carried_bytes: memories of all lanes of the rank.
    """

    pipeline_rank: int
    stages: tuple[Stage, ...]
    parameters: int
    device: StateBytes
    host: StateBytes
    partition: int
    largest_group: int
    largest_parameter: int
    carried_bytes: int

    @property
    def layers(self) -> int:
        return sum(stage.last_layer - stage.first_layer for stage in self.stages)

    @property
    def embeds(self) -> bool:
        return self.stages[0].embeds

    @property
    def predicts(self) -> bool:
        return self.stages[-1].predicts


def parameter_sizes(config: RunConfig, stages: tuple[Stage, ...]) -> list[list[int]]:
    """Elements of each parameter by AdamW group (matrices, vectors, gates), in the order of the modules."""
    model, tensor = config.model, config.parallel.tensor_size
    hidden, key, value = model.hidden_size, model.key_dim, model.value_dim
    heads, ffn = model.num_heads // tensor, model.ffn_size // tensor
    kv = model.kv_heads // tensor if model.kv_heads % tensor == 0 else model.kv_heads
    attention = [model.conv_tokens * hidden] if model.conv_tokens else []
    attention += [heads * key * hidden, kv * key * hidden, kv * value * hidden, heads * value * hidden]
    matrices: list[int] = []
    vectors: list[int] = []
    gates: list[int] = []
    for stage in stages:
        layers = stage.last_layer - stage.first_layer
        if stage.embeds:
            matrices.append(model.vocab_size // tensor * hidden)
        matrices += [*attention, ffn * hidden, ffn * hidden, ffn * hidden] * layers
        biases = [heads * key, kv * key, kv * value] if model.qkv_bias else []
        vectors += [hidden, *biases, *([key, key] if model.qk_norm else []), hidden] * layers
        gates += [heads] * (layers if isinstance(model.attention, InfiniConfig) else 0)
        if stage.predicts:
            vectors.append(hidden)
            matrices += [] if model.tied_embeddings else [model.vocab_size // tensor * hidden]
    return [group for group in (matrices, vectors, gates) if group]


def find_parts(config: RunConfig) -> list[Part]:
    """One for each pipeline stage; `config` has its `parallel.data_size`. Optimizer states are those of rank 0."""
    parallel = config.parallel
    replicas = (parallel.data_size or 1) * parallel.context_size
    zero_stage = effective_stage(config)
    parts = []
    for rank in range(parallel.pipeline_size):
        stages = tuple(find_stages(config.model.num_layers, parallel, rank))
        groups = parameter_sizes(config, stages)
        partition = divide_states(groups, zero_stage, 0, replicas)
        sizes = [size for group in groups for size in group]
        device, host = count_bytes(config, zero_stage, partition, sizes)
        layers = sum(stage.last_layer - stage.first_layer for stage in stages)
        parts.append(
            Part(
                pipeline_rank=rank,
                stages=stages,
                parameters=sum(sizes),
                device=device,
                host=host,
                partition=partition.buffer,
                largest_group=max(divide_states([group], zero_stage, 0, replicas).buffer for group in groups),
                largest_parameter=max(sizes),
                carried_bytes=carried_layer_bytes(config) * layers * config.lanes_per_rank,
            )
        )
    return parts


def carried_layer_bytes(config: RunConfig) -> int:
    """Of one lane and layer on one rank: memory, normaliser, count, overlap, convolution; 0 if nothing travels."""
    model, attention = config.model, config.model.attention
    if not config.train.carry_memory or model.segment_tokens is None:
        return 0
    kv = max(1, model.kv_heads // config.parallel.tensor_size)
    activation_bytes = 2 if config.train.precision == "bf16" else 4
    overlap = getattr(attention, "overlap_tokens", getattr(attention, "cache_tokens", 0))
    carried = overlap * (kv * (model.key_dim + model.value_dim) * activation_bytes + 8 + 4)  # document, weight
    if isinstance(attention, InfiniConfig):
        carried += 4 * (kv * model.key_dim * (model.value_dim + 1) + 1)
        carried += model.conv_tokens * model.hidden_size * activation_bytes
    return carried
