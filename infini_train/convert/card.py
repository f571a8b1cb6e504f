"""The card of an exported model: README.md with the facts of its run. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from infini_train.config.run import RunConfig
from infini_train.config.segment_attention import FP32_BYTES

CARD = "README.md"
_PAGE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [infini-attention]
---

# {name}

A language model whose context has no end: attention is exact inside a segment, and what is older is read from a memory
of fixed size ([Infini-attention](https://arxiv.org/abs/2404.07143)). Written by `infini-train export hf`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # runs modeling_infini.py, which lies here
text = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=100)[0]))
```

A text of any length is read in windows. To read once and ask often, keep the state,
`model(ids, use_cache=True, logits_to_keep=1).past_key_values`, and hand a copy of it (`copy.deepcopy`) to `generate`.

| | |
|---|---|
| Parameters | {parameters:,} |
| Attention | {attention} |
| Memory of a text | {memory} |
| Trained | {trained} |
"""


def describe_run(config: RunConfig, state: Mapping[str, Any], parameters: int) -> str:
    """The text of README.md.

    Args:
        config: of the run.
        state: what the checkpoint says beside its weights.
        parameters: their number.
    """
    model = config.model
    numbers = sum(layer.memory_numbers(model.shape) for layer in model.layers)
    full = sum(layer.kind == "full" for layer in model.layers)
    memory = f"{numbers * FP32_BYTES:,} bytes, whatever its length; beside it the open segment"
    if full:
        memory += f". {full} of {model.num_layers} layers have full attention and keep all keys and values"
    steps, tokens = state.get("step", 0), state.get("tokens", 0)
    trained = f"{tokens:,} tokens in {steps:,} steps, windows of {config.train.window_tokens:,} tokens"
    if not steps:
        trained = "not here: imported"
    elif config.train.init_from is not None:
        trained += ", from the weights of another model"
    return _PAGE.format(
        name=config.name,
        parameters=parameters,
        attention="; ".join(dict.fromkeys(_describe(layer) for layer in model.layers)),
        memory=memory,
        trained=trained,
    )


def _describe(attention: Any) -> str:
    """Its kind, and the fields that say what it computes, where they differ from the defaults."""
    usual = type(attention)()
    fields = {name: value for name, value in vars(attention).items() if name not in ("kind", *attention.initial)}
    told = [f"{name} {value}" for name, value in fields.items() if value != getattr(usual, name)]
    if "segment_tokens" in fields:
        told = [
            f"segments of {fields['segment_tokens']} tokens",
            *(t for t in told if not t.startswith("segment_tokens")),
        ]
    return ", ".join([attention.kind, *told])
