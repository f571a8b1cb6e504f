"""A run between two steps: everything it holds in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from infini_train.checkpoint.background import BackgroundSaver
from infini_train.config.run import RunConfig
from infini_train.data.lanes import Batch, prefetch
from infini_train.data.shards import Dataset
from infini_train.data.source import Position, Reader, Source
from infini_train.parallel.mesh import Place
from infini_train.parallel.pipeline import Carried, Stages
from infini_train.parallel.zero import Engine
from infini_train.train.building import empty_carried
from infini_train.train.guards import Guard
from infini_train.train.side_files import SideFiles
from infini_train.train.step import StepResult


@dataclass
class Session:
    """A run between two steps. `step`, `tokens`, `lanes`, `carried` and `guard` advance together."""

    config: RunConfig
    place: Place
    stages: Stages
    engine: Engine
    source: Source
    reader: Reader
    validation: Dataset | None
    saver: BackgroundSaver
    parameters: int  # of the whole model
    lanes: Position
    carried: Carried
    step: int = 0
    tokens: int = 0
    saved: bool = False  # whether there is a checkpoint to roll back to
    side_files: SideFiles = field(default_factory=SideFiles)
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.config.guard)

    def batches(self) -> Iterator[tuple[Batch, Position]]:
        """Batches of this rank's lanes from the current position on, prefetched in the background where possible."""
        if not self.reader.adaptive:
            yield from prefetch(self.reader, self.lanes)
            return
        while True:
            batch, lanes = self.reader.next(self.lanes)
            assert batch is not None
            yield batch, lanes

    def advance(self, result: StepResult, lanes: Position) -> None:
        """Moves counters, data position and memory past a finished step; a skipped one leaves the memory empty."""
        self.step += 1
        self.tokens += self.config.train.tokens_per_step
        self.guard.record(result.comparable_loss, result.problem)
        if result.problem:
            self.lanes, self.carried = lanes, empty_carried(self.config, self.stages)
            return
        self.lanes = lanes if result.variation.without_local else self.reader.observe_loss(lanes, result.loss)
        if self.config.train.carry_memory:
            self.carried = result.states
