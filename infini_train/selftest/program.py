"""The run that all layouts must do alike: a few optimizer steps with carried memory, and checkpoints to compare."""

import gc

from infini_train.checkpoint import store
from infini_train.config.files import to_tree
from infini_train.config.run import RunConfig
from infini_train.parallel import mesh
from infini_train.selftest.batches import make_batch, take_lanes
from infini_train.selftest.cases import STEPS
from infini_train.train.building import build
from infini_train.train.carry import Lanes
from infini_train.train.checkpointing import own_fragments
from infini_train.train.optim import learning_rates
from infini_train.train.step import train_step
from infini_train.train.variation import draw_variation

SAVED = (1, STEPS)  # after which a checkpoint is written: first moments are gradients, and the end


def run_program(config: RunConfig) -> None:
    """Trains; all ranks call it together. Losses and gradient norms lie in the last checkpoint's state.

    Args:
        config: of `cases.configure` or `cases.reference_of`.
    """
    place = mesh.start(config.parallel)
    stages, engine, _ = build(config, place, None)
    try:
        carried = stages.initial_carried(config.micro_lanes, config.lanes_per_rank // config.micro_lanes)
        mine = Lanes.of(config, place.data[0])
        losses: list[float] = []
        grad_norms: list[float] = []
        for step in range(STEPS):
            batch = take_lanes(make_batch(step, config), mine.first, config.lanes_per_rank)
            rates = learning_rates(step, STEPS, config.optim)
            # At full cost from the first step on, whose gradients are compared.
            variation = draw_variation(config, step)._replace(write_cost=config.train.write_cost)
            result = train_step(stages, engine, batch, carried, rates, variation=variation)
            carried = result.states
            losses.append(result.loss)
            grad_norms.append(result.grad_norm)
            if step + 1 in SAVED:
                store.save(
                    config.directory,
                    step + 1,
                    own_fragments(config, stages, engine, carried),
                    {"losses": losses, "grad_norms": grad_norms},
                    to_tree(config),
                    rank=place.world[0],
                    world_size=place.world[1],
                    barrier=mesh.background_barrier,
                )
    finally:
        engine.close()
        del stages, engine
        gc.collect()  # modules and hooks of this layout refer to each other
        mesh.stop_layout()
