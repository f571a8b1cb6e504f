"""How the state of a layer says what it holds, so that whoever stores, cuts or moves it asks instead of guessing.

A state is a NamedTuple. Each field is annotated with `Stored`: a name that checkpoints keep for good, whatever becomes
of the code's own names, and for tensors the meaning of each dimension. A field may be a state itself.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

LANES, KV_HEADS = "lanes", "kv_heads"


class Stored(NamedTuple):
    """How a field is stored: its name, and the names of a tensor's dimensions, separated by blanks.

    `lanes` is divided over the data-parallel ranks and over micro-batches, `kv_heads` over the tensor-parallel ranks;
    all others are whole on every rank. All context-parallel ranks hold the same state.
    """

    name: str
    dims: str = ""


class Leaf(NamedTuple):
    """A tensor of a state, its dotted name, and its dimensions' names."""

    name: str
    tensor: Tensor
    dims: tuple[str, ...]


def name_leaves(state: Any, prefix: str) -> Iterator[Leaf]:
    """The tensors of a layer's state with dotted names, in a fixed order; none for None."""
    if state is None:
        return
    for field, stored in _fields(state.__class__):
        name, value = f"{prefix}.{stored.name}", getattr(state, field)
        if not isinstance(value, Tensor):
            yield from name_leaves(value, name)
            continue
        dims = tuple(stored.dims.split())
        assert len(dims) == value.dim(), f"{name}: declared {len(dims)} dimensions, and has {value.dim()}"
        yield Leaf(name, value, dims)


def rebuild(state: Any, prefix: str, value_of: Callable[[str, Tensor], Tensor]) -> Any:
    """A state of the same form, each tensor replaced by `value_of` of its dotted name and itself."""
    if state is None:
        return None
    values = []
    for field, stored in _fields(state.__class__):
        name, value = f"{prefix}.{stored.name}", getattr(state, field)
        values.append(value_of(name, value) if isinstance(value, Tensor) else rebuild(value, name, value_of))
    return type(state)(*values)


@functools.cache
def _fields(state_class: type) -> tuple[tuple[str, Stored], ...]:
    hints = get_type_hints(state_class, include_extras=True)
    found = []
    for field in state_class._fields:  # type: ignore[attr-defined]
        stored = [note for note in getattr(hints[field], "__metadata__", ()) if isinstance(note, Stored)]
        assert len(stored) == 1, f"{state_class.__name__}.{field}: declare how it is stored (ops.state.Stored)"
        strange = [dim for dim in stored[0].dims.split() if "head" in dim and dim != KV_HEADS]
        assert not strange, f"{state_class.__name__}.{field}: {strange[0]}: only {KV_HEADS} are divided over ranks"
        found.append((field, stored[0]))
    return tuple(found)
