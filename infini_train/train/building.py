"""What a run is built of: its text, and this rank's part of the model inside its engine."""

from pathlib import Path

import torch

from infini_train.checkpoint import compat, store
from infini_train.checkpoint.fragments import CheckpointError
from infini_train.checkpoint.reader import Checkpoint
from infini_train.checkpoint.weights import load_weights
from infini_train.config.errors import ConfigError
from infini_train.config.files import to_tree
from infini_train.config.run import RunConfig
from infini_train.data.shards import Dataset
from infini_train.data.source import Source, open_source
from infini_train.model import flops
from infini_train.model.init import initialise
from infini_train.model.slices import find_slice
from infini_train.parallel import device, mesh
from infini_train.parallel.mesh import Place
from infini_train.parallel.pipeline import Carried, Stages
from infini_train.parallel.zero import Engine
from infini_train.train.compiling import compile_layers
from infini_train.train.freezing import check_rules, freeze
from infini_train.train.memory_need import require_memory
from infini_train.train.optim import parameter_groups


def open_sources(config: RunConfig) -> tuple[Source, Dataset | None]:
    """The training text and the held-out text.

    Raises:
        ConfigError: one can't be opened or has more token ids than the model's vocabulary, or their tokenizers differ.
    """
    source, validation, folder = open_source(config), None, config.data.validation
    _check_vocabulary("data.train", source.name, source.vocab_size, config)
    if folder is not None:
        try:
            validation = Dataset.open(folder, config.data.cache_dir)
        except ConfigError as error:
            raise ConfigError(f"data.validation: {error}") from error
        _check_vocabulary("data.validation", folder, validation.manifest.vocab_size, config)
        if validation.manifest.tokenizer.sha256 != source.tokenizer_sha256:
            raise ConfigError(
                f"data.validation: {folder} was encoded with another tokenizer than {source.name};"
                " encode both with the same one"
            )
    return source, validation


def _check_vocabulary(field: str, name: str, vocab_size: int, config: RunConfig) -> None:
    if vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the {vocab_size} token ids"
            f" of {name} ({field}); pass --set model.vocab_size={vocab_size} (or more)"
        )


def build(config: RunConfig, place: Place, origin: Checkpoint | None) -> tuple[Stages, Engine, int]:
    """This rank's stages inside their engine, newly initialised or with the weights of `origin`.

    Returns:
        Stages, engine, and the number of parameters of the whole model.

    Raises:
        ConfigError: they can't fit into this rank's memory, or a rule of `optim.rules` holds for nothing.
    """
    require_memory(config)
    train = config.train
    recompute = train.activation_checkpointing == "layer"
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    stages = Stages(config.model, config.parallel, place, dtype=dtype, recompute_layers=recompute)
    for stage in stages.transformers():
        if origin is None:
            initialise(stage, config.model, config.seed)
        else:
            initialise(stage, config.model, config.seed, added=load_weights(stage, origin))
    named = list(stages.named_globally())
    freeze(named, config.optim)
    check_rules(named, config.optim)
    if train.compile:
        compile_layers(stages.transformers())
    parameters, declared = count_parameters(stages), flops.count_parameters(config.model)
    # A variant that counts wrongly, or one whose parameter per head is not divided over tensor-parallel ranks.
    assert parameters == declared, f"the model has {parameters} parameters, and its config counts {declared}"
    engine = Engine(
        stages.to(device.current()),
        named,
        parameter_groups(named, config.optim),
        optim=config.optim,
        parallel=config.parallel,
        precision=train.precision,
        micro_batch_lanes=config.micro_lanes,
    )
    return stages, engine, parameters


def count_parameters(stages: Stages) -> int:
    """Parameters of the whole model; all ranks call it together."""
    owned = (
        0
        if stages.place.is_replica
        else sum(parameter.numel() for _, parameter in stages.named_globally() if find_slice(parameter).owned)
    )
    return round(mesh.sum_over_world([float(owned)])[0])


def empty_carried(config: RunConfig, stages: Stages) -> Carried:
    """The memory of lanes that have read nothing yet."""
    micro_batches = config.lanes_per_rank // config.micro_lanes
    return stages.initial_carried(config.micro_lanes, micro_batches, config.train.carry_memory)


def open_origin(config: RunConfig, source: Source) -> Checkpoint | None:
    """The checkpoint whose weights a new run starts from (`train.init_from`), if it names one.

    Raises:
        ConfigError: it is damaged, or has another model or tokenizer.
    """
    if config.train.init_from is None:
        return None
    try:
        path = Path(config.train.init_from)
        origin = store.look_again(lambda: store.open_checkpoint(store.resolve(path)))
    except CheckpointError as error:
        raise ConfigError(f"train.init_from: {error}") from error
    compat.check_same_model(origin.config, to_tree(config), f"train.init_from: {origin.path}")
    if origin.state.get("tokenizer") != source.tokenizer_sha256:
        raise ConfigError(
            f"train.init_from: {origin.path} was trained with another tokenizer than {source.name};"
            f" encode the text with the tokenizer in {origin.path.parent.parent}"
        )
    return origin
