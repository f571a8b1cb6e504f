"""Which layers lie on which pipeline stage. Imports no torch."""

from typing import NamedTuple

from infini_train.config.parallel import ParallelConfig


class Stage(NamedTuple):
    """Consecutive layers of a model that one pipeline stage holds; the first also embeds, the last one predicts."""

    first_layer: int
    last_layer: int  # exclusive
    embeds: bool = True
    predicts: bool = True


def divide_layers(num_layers: int, stages: int) -> list[range]:
    """Consecutive layers of each stage; the first stages take one more where they don't divide evenly."""
    each, more = divmod(num_layers, stages)
    edges = [stage * each + min(stage, more) for stage in range(stages + 1)]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False)]


def find_stages(num_layers: int, parallel: ParallelConfig, pipeline_rank: int) -> list[Stage]:
    """The stages on a pipeline rank: its turn in every round of the interleaved order."""
    count = parallel.pipeline_size * parallel.virtual_stages
    layers = divide_layers(num_layers, count)
    return [
        Stage(layers[number].start, layers[number].stop, number == 0, number == count - 1)
        for number in range(pipeline_rank, count, parallel.pipeline_size)
    ]
