"""How a step of training may differ from the model that is evaluated.

Its segments may have another length, there may be no local attention, writing may cost something. All of it follows
from the run's config, its seed and the step's number alone, so all ranks and a resumed run do the same.
"""

from typing import NamedTuple

import numpy as np

from infini_train.config.run import RunConfig

STREAM = 2**31  # of these draws; texts that are made up draw from the same seed and step, by lanes


class Variation(NamedTuple):
    """segment_tokens: of all layers that have segments; None: the model's. without_local: memories are read alone.

    write_cost: of this step, see `TrainConfig.write_cost`. teacher_share: see `TeacherConfig`; 0: no teacher.
    """

    segment_tokens: int | None = None
    without_local: bool = False
    write_cost: float = 0.0
    teacher_share: float = 0.0


AS_EVALUATED = Variation()


def draw_variation(config: RunConfig, step: int) -> Variation:
    """The variation of a step; the first is 0."""
    train = config.train
    lengths, share = train.segment_tokens, train.local_dropout * max(0.0, 1 - step / train.local_dropout_steps)
    random = np.random.default_rng([config.seed, step, STREAM])
    without_local = random.random() < share  # drawn in any case, so that one option does not change the other's draws
    length = lengths[random.integers(len(lengths))] if lengths else None
    cost = train.write_cost * min(1.0, step / train.write_cost_steps)
    return Variation(length, without_local, cost, 0.0 if train.teacher is None else train.teacher.share)
