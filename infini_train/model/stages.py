"""Which layers lie on which pipeline stage. Imports no torch."""

from typing import NamedTuple

from infini_train.config.parallel import ParallelConfig, divide_layers


class Stage(NamedTuple):
    """Consecutive layers of a model that one pipeline stage holds; the first also embeds, the last one predicts."""

    first_layer: int
    last_layer: int  # exclusive
    embeds: bool = True
    predicts: bool = True


def find_stages(num_layers: int, parallel: ParallelConfig, pipeline_rank: int) -> list[Stage]:
    """The stages on a pipeline rank: its turn in every round of the interleaved order."""
    count = parallel.pipeline_size * parallel.virtual_stages
    layers = divide_layers(num_layers, count)
    return [
        Stage(layers[number].start, layers[number].stop, number == 0, number == count - 1)
        for number in range(pipeline_rank, count, parallel.pipeline_size)
    ]
