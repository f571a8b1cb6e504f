"""`model.attention`: the variants of attention. A class of theirs says all of a variant that needs no tensors.

That is: the fields, what they have to satisfy, which layouts the variant allows, what an export loses, what a resumed
or continued run may change, and the arithmetic of parameters, memory and FLOPs. Its tensors are those of its
`SequenceMixer` (model/variants.py names both).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from infini_train.config.baselines import MemorizingConfig, RmtConfig, TransformerXLConfig
from infini_train.config.errors import require
from infini_train.config.segment_attention import FullConfig, InfiniConfig, LocalConfig
from infini_train.config.union import one_of
from infini_train.config.variant import AttentionVariant

__all__ = [
    "KINDS",
    "AttentionConfig",
    "FullConfig",
    "InfiniConfig",
    "LocalConfig",
    "MemorizingConfig",
    "MixedConfig",
    "RmtConfig",
    "TransformerXLConfig",
]

KINDS: dict[str, type[AttentionVariant]] = {
    "infini": InfiniConfig,
    "local": LocalConfig,
    "transformer_xl": TransformerXLConfig,
    "memorizing": MemorizingConfig,
    "rmt": RmtConfig,
    "full": FullConfig,
}


# One of KINDS, chosen by `kind`; a layer's can't be mixed again.
AttentionConfig = Annotated[AttentionVariant, one_of(KINDS)]
LayerAttentionConfig = Annotated[AttentionVariant, one_of(KINDS, without="mixed")]


@dataclass(frozen=True, kw_only=True)
class MixedConfig(AttentionVariant):
    """Layers of several kinds, in a pattern: memory in most and full attention in a few, say."""

    kind: Literal["mixed"] = "mixed"  # chooses this attention
    # name -> attention of the layers of that name: the fields of any other kind, as in
    # {memory: {kind: infini, update: gated_delta}, whole: {kind: full}}
    variants: Mapping[str, LayerAttentionConfig]
    # a name for each layer, from the first one on; repeated if there are more layers, as in [memory, memory, whole]
    pattern: tuple[str, ...]

    def __post_init__(self) -> None:
        require(bool(self.pattern), "model.attention.pattern", "give at least one name of model.attention.variants")
        for name in self.pattern:
            known = ", ".join(self.variants) or "none"
            require(name in self.variants, "model.attention.pattern", f"{name} is none of the variants; known: {known}")
        for name, variant in self.variants.items():
            field = f"model.attention.variants.{name}"
            require(
                name in self.pattern, field, "no layer has it; put it into model.attention.pattern, or leave it out"
            )
            require(
                variant.fits_any_layer, f"{field}.kind", f"{variant.kind} concerns all layers of a model; use another"
            )

    def __hash__(self) -> int:
        """As of a frozen dataclass, whose own can't hash a mapping."""
        return hash((frozenset(self.variants.items()), self.pattern))

    def at(self, layer: int, num_layers: int) -> AttentionVariant:
        """The pattern, again and again."""
        return self.variants[self.pattern[layer % len(self.pattern)]]

    def check_model(self, num_layers: int) -> None:
        """The pattern must fit."""
        require(
            len(self.pattern) <= num_layers,
            "model.attention.pattern",
            f"has {len(self.pattern)} names for {num_layers} layers; shorten it, or raise model.num_layers",
        )


KINDS["mixed"] = MixedConfig
