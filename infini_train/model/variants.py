"""The table of attention variants: config kind -> class."""

from megatron.core.model_parallel_config import ModelParallelConfig

from infini_train.config.model import ModelConfig
from infini_train.model.infini import InfiniAttention
from infini_train.model.local import FullAttention, LocalAttention, TransformerXLAttention
from infini_train.model.mixer import SequenceMixer
from infini_train.ops.memory import Ranks

VARIANTS = {
    "infini": InfiniAttention,
    "local": LocalAttention,
    "transformer_xl": TransformerXLAttention,
    "full": FullAttention,
}


def build_mixer(config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None) -> SequenceMixer:
    """The layer's attention. `ranks` tells it how its memory and overlap cross context-parallel ranks."""
    return VARIANTS[config.attention.kind](config, parallel, ranks)
