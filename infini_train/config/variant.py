"""What the rest of the program asks of a variant of attention, and the arithmetic that variants share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from infini_train.config.errors import ConfigError, require
from infini_train.config.parallel import ParallelConfig


class LayerShape(NamedTuple):
    """The sizes that all variants of one model share."""

    hidden_size: int
    num_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def token_numbers(self) -> int:
        """Numbers in a token's keys and values."""
        return (self.key_dim + self.value_dim) * self.kv_heads


class TokenFlops(NamedTuple):
    """Floating-point operations of a token's forward pass, by purpose."""

    matrices: float = 0.0  # projections, feed-forward, head
    attention: float = 0.0  # local: causal, so half of the square is useful
    memory_read: float = 0.0  # Eq. 7
    memory_write: float = 0.0  # Eq. 8
    delta: float = 0.0  # what Eq. 9 adds; its chain of D x D products is spread over the segment

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: "TokenFlops") -> "TokenFlops":
        """The sums, purpose by purpose."""
        return TokenFlops(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class AttentionVariant:
    """What the rest of the program asks of a variant of attention.

    The defaults suit a variant that adds nothing. What has to be said is refused: context parallelism, and exports.

    A model's layers need not be alike: `at` gives the variant of each. It, `check_model`, `stack_parameters` and
    `passes` are asked of the variant that the config names, all else of each layer's own.
    """

    kind: str

    has_gates: ClassVar[bool] = False  # a gate for each head, which mixes what it sees with what it remembers
    crosses_ranks: ClassVar[bool] = False  # its module hands its state to the other ranks of a window (LayerSpec.ranks)
    fits_any_layer: ClassVar[bool] = True  # also where other layers of the model have other kinds
    # The field segment_tokens may change at the edge of a window: weights and the state carried there fit any length.
    segments_may_vary: ClassVar[bool] = False
    # Fields that a model with the same weights may change, and why. Those of `initial` also in a resumed run.
    same_weights: ClassVar[Mapping[str, str]] = {}
    initial: ClassVar[Mapping[str, str]] = {}
    # Fields that give a model parameters of their own, and their values that give none. A trained model may gain them,
    # and can't lose them.
    adds_parameters: ClassVar[Mapping[str, object]] = {}

    @property
    def segment_tokens(self) -> int | None:
        """Tokens in a segment, a field of most variants; None for one endless segment."""
        return None

    @property
    def chooses_writes(self) -> bool:
        """Whether each token says how strongly it is written."""
        return False

    @property
    def seen_tokens(self) -> int:
        """Tokens before its segment that local attention sees as well."""
        return 0

    @property
    def sink_tokens(self) -> int:
        """First tokens of a document that local attention sees from everywhere in it."""
        return 0

    def at(self, layer: int, num_layers: int) -> "AttentionVariant":
        """The variant of a layer, counted from 0."""
        return self

    def check_model(self, num_layers: int) -> None:
        """Raises ConfigError if the fields don't fit the model."""

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Raises ConfigError if the variant can't be divided in this way; the message says why."""
        self.check_context(parallel, "the state")

    def check_context(self, parallel: ParallelConfig, carried: str) -> None:
        """Refuses context parallelism unless the variant `crosses_ranks`; `carried` is what would have to."""
        require(
            parallel.context_size == 1 or self.crosses_ranks,
            "parallel.context_size",
            f"{carried} of model.attention.kind {self.kind} does not cross ranks; use infini, local or full,"
            " or context_size 1",
        )

    def check_export(self) -> str | None:
        """What a plain Llama-like model with these weights computes instead, or None if it computes the same.

        Raises:
            ConfigError: the weights alone are another model, as it is if a variant says nothing.
        """
        raise ConfigError(
            f"model.attention.kind: {self.kind} is no attention that a model type there has; its weights alone are"
            " another model"
        )

    def extra_parameters(self, shape: LayerShape) -> int:
        """Parameters of a layer beside the projections."""
        return 0

    def stack_parameters(self, shape: LayerShape) -> int:
        """Parameters of the whole model that lie outside its layers."""
        return 0

    def memory_numbers(self, shape: LayerShape) -> int:
        """Numbers that a layer remembers of a sequence, as the paper's Table 2 counts them."""
        return 0

    def cached_numbers(self, shape: LayerShape) -> int:
        """Numbers that a layer keeps of every token that it reads outside training; 0 where its state is bounded."""
        return 0

    def least_carried_bytes(self, shape: LayerShape, weight_bytes: int) -> int:
        """What a layer hands on for each lane, or less: a run that has no room for it is refused before it is built."""
        return self.memory_numbers(shape) * weight_bytes

    @property
    def passes(self) -> float:
        """Places that run through the layers, for each token."""
        return 1.0

    def mixing_flops(self, shape: LayerShape, window_tokens: int) -> TokenFlops:
        """Useful operations of a layer's forward pass, per token, beside its weight matrices."""
        seen = window_tokens if self.segment_tokens is None else self.segment_tokens
        return TokenFlops(attention=attention_flops(shape, seen))


def attention_flops(shape: LayerShape, seen_tokens: float) -> float:
    """FLOPs of causal attention per token: 2 x half of the square."""
    return shape.num_heads * seen_tokens * (shape.key_dim + shape.value_dim)
