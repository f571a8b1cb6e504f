"""The table of attention variants: config class -> module.

A new variant is its two classes, a line here and one in `config.attention.KINDS`.

The config class (config/attention.py) says all that needs no tensors, the module the rest.
"""

from megatron.core.model_parallel_config import ModelParallelConfig

from infini_train.config.attention import (
    FullConfig,
    InfiniConfig,
    LocalConfig,
    MemorizingConfig,
    RmtConfig,
    TransformerXLConfig,
)
from infini_train.config.model import ModelConfig
from infini_train.config.variant import AttentionVariant
from infini_train.model.infini import InfiniAttention
from infini_train.model.local import FullAttention, LocalAttention, TransformerXLAttention
from infini_train.model.memorizing import MemorizingAttention
from infini_train.model.mixer import LayerSpec, SequenceMixer
from infini_train.model.recurrent import RmtAttention
from infini_train.ops.ranks import Ranks

MIXERS: dict[type[AttentionVariant], type[SequenceMixer]] = {
    InfiniConfig: InfiniAttention,
    LocalConfig: LocalAttention,
    TransformerXLConfig: TransformerXLAttention,
    MemorizingConfig: MemorizingAttention,
    RmtConfig: RmtAttention,
    FullConfig: FullAttention,
}


def mixer_class(attention: AttentionVariant) -> type[SequenceMixer]:
    """The module of a variant."""
    assert type(attention) in MIXERS, f"{type(attention).__name__} has no module: add it to MIXERS"
    return MIXERS[type(attention)].chosen_by(attention)


def build_mixer(
    config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None, layer: int = 0
) -> SequenceMixer:
    """The attention of a layer. `ranks` is how its memory and overlap cross context-parallel ranks."""
    attention = config.attention.at(layer, config.num_layers)
    return mixer_class(attention)(LayerSpec(config, attention, parallel, ranks, layer))
