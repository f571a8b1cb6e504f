"""Names and shapes of what a model here and one in Hugging Face's layout both have. Imports no torch."""

from typing import NamedTuple

SIZES = {  # theirs -> ours
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_size",
}


class Weight(NamedTuple):
    """A tensor that both sides have, in the same layout."""

    theirs: str
    shape: tuple[int, ...]
