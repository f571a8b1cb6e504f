"""`parallel`: how a run is divided over processes."""

from dataclasses import dataclass
from typing import Literal

from infini_train.config.errors import require
from infini_train.config.values import Few, Ranks, Seconds, Stages

BUCKET_ELEMENTS = 50_000_000  # reduced at once; DeepSpeed's 500 million would hold 2 GB of every rank in fp32


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is divided over processes: tensor x pipeline x context x data."""

    tensor_size: Ranks = 1  # ranks that share each layer: heads, gates, memories, feed-forward, vocabulary
    sequence_parallel: bool = False  # shard norms and residuals along the sequence over the tensor-parallel ranks
    pipeline_size: Stages = 1  # stages of consecutive layers
    virtual_stages: Few = 1  # stages per pipeline rank (interleaved schedule)
    context_size: Ranks = 1  # ranks that share each window; each takes consecutive whole segments
    data_size: Ranks | None = None  # ranks that share the lanes; null: all remaining processes
    zero_stage: Literal[1, 2, 3] = 1  # DeepSpeed ZeRO: 1 shards optimizer states, 2 also gradients, 3 also weights
    offload_optimizer: bool = False  # keep optimizer states and run AdamW in host memory
    timeout_s: Seconds = 600.0  # a rank that does not respond for this long ends the run

    def __post_init__(self) -> None:
        for name in ("tensor_size", "pipeline_size", "virtual_stages", "context_size", "data_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"parallel.{name}", "must be positive")
        require(self.timeout_s > 0, "parallel.timeout_s", "must be positive")
        require(
            not self.sequence_parallel or self.tensor_size > 1,
            "parallel.sequence_parallel",
            "divides the sequence over tensor-parallel ranks, but parallel.tensor_size is 1; raise it or set false",
        )
        require(
            self.virtual_stages == 1 or self.pipeline_size > 1,
            "parallel.virtual_stages",
            "needs parallel.pipeline_size above 1",
        )
        require(
            self.zero_stage < 3 or self.pipeline_size == 1,
            "parallel.zero_stage",
            "3 does not work with parallel.pipeline_size above 1 (DeepSpeed would hang); use stage 1 or 2",
        )

    @property
    def model_size(self) -> int:
        """Processes that hold one replica of the model and its window."""
        return self.tensor_size * self.pipeline_size * self.context_size


def divide_layers(num_layers: int, stages: int) -> list[range]:
    """Consecutive layers of each stage; the first stages take one more where they don't divide evenly."""
    each, more = divmod(num_layers, stages)
    edges = [stage * each + min(stage, more) for stage in range(stages + 1)]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False)]


def divide_over_pipeline(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """The layers on each pipeline rank: its stages are its turns in every round of the interleaved order."""
    stages = divide_layers(num_layers, parallel.pipeline_size * parallel.virtual_stages)
    return [
        [layer for stage in stages[rank :: parallel.pipeline_size] for layer in stage]
        for rank in range(parallel.pipeline_size)
    ]
