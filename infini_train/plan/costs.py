"""What each layer and each end of a model costs one rank in one micro-batch; `rehearsal.py` finds it."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from infini_train.model.stages import Stage
from infini_train.plan.work import Work


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One piece of the model in one micro-batch.

    Attributes:
        forward, backward: without recomputation.
        again: the part of the forward that recomputation runs: up to the last tensor that backward needs.
        input_bytes: what enters it: hidden states, or token ids.
        kept_bytes: its input and what its forward allocates, as far as backward needs it; without its output.
        working_bytes: what forward or backward needs at its fullest beyond that; without gradients of parameters.
    """

    forward: Work
    backward: Work
    again: Work
    input_bytes: float
    kept_bytes: float
    working_bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)})

    def times(self, factor: float) -> "Cost":
        """Every field scaled."""
        scaled = {}
        for field in fields(Cost):
            value = getattr(self, field.name)
            scaled[field.name] = value.times(factor) if isinstance(value, Work) else value * factor
        return Cost(**scaled)

    def without(self, part: "Cost") -> "Cost":
        """Minus a piece that was run along with it. Working memory is a maximum, not a sum: it stays."""
        return dataclasses.replace(self + part.times(-1), working_bytes=self.working_bytes)

    def called(self, times: int) -> "Cost":
        """Called this many times before the first backward. Working memory stays, as above."""
        return dataclasses.replace(self.times(times), working_bytes=self.working_bytes)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of a whole model.

    Attributes:
        layers: by number; equal layers share one object.
        embedding: token ids to hidden states.
        head: final norm, logits and loss.
        stack: what a stage does around its layers; nothing, for most models.
        on_cuda: whether the kernels are those of CUDA.
    """

    layers: tuple[Cost, ...]
    embedding: Cost
    head: Cost
    stack: Cost
    on_cuda: bool

    def of_layers(self, stages: Iterable[Stage]) -> list[tuple[Cost, int]]:
        """The distinct costs among these stages' layers, and how many layers have each."""
        numbers = [number for stage in stages for number in range(stage.first_layer, stage.last_layer)]
        counts = collections.Counter(id(self.layers[number]) for number in numbers)
        distinct = {id(self.layers[number]): self.layers[number] for number in numbers}
        return [(distinct[key], count) for key, count in counts.items()]

    def work(self, stages: Sequence[Stage], recompute: bool) -> dict[str, Work]:
        """Forward and backward of a micro-batch on these stages, recomputation included, by piece."""
        found = {"layers": Work()}
        for cost, count in self.of_layers(stages):
            once = cost.forward + cost.backward + (cost.again if recompute else Work())
            found["layers"] += once.times(count)
        found["around the layers"] = (self.stack.forward + self.stack.backward).times(len(stages))
        if any(stage.embeds for stage in stages):
            found["embedding"] = self.embedding.forward + self.embedding.backward
        if any(stage.predicts for stage in stages):
            found["head and loss"] = self.head.forward + self.head.backward
        return found
