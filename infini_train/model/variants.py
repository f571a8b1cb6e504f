"""The table of attention variants: config kind -> class."""

from megatron.core.model_parallel_config import ModelParallelConfig

from infini_train.config.model import ModelConfig
from infini_train.model.infini import InfiniAttention
from infini_train.model.local import FullAttention, LocalAttention, TransformerXLAttention
from infini_train.model.memorizing import MemorizingAttention
from infini_train.model.mixer import SequenceMixer
from infini_train.model.recurrent import RmtAttention
from infini_train.ops.memory import Ranks

VARIANTS = {
    "infini": InfiniAttention,
    "local": LocalAttention,
    "transformer_xl": TransformerXLAttention,
    "memorizing": MemorizingAttention,  # one layer; the others are Transformer-XL's
    "rmt": RmtAttention,
    "full": FullAttention,
}


def build_mixer(
    config: ModelConfig, parallel: ModelParallelConfig, ranks: Ranks | None, layer: int = 0
) -> SequenceMixer:
    """The attention of a layer. `ranks` tells it how its memory and overlap cross context-parallel ranks."""
    kind = config.attention.kind
    if kind == "memorizing" and layer != config.retrieval_layer:
        kind = "transformer_xl"
    if kind == "rmt":
        return RmtAttention(config, parallel, ranks, is_first=layer == 0)
    return VARIANTS[kind](config, parallel, ranks)
