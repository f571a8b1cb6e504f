"""Memory in a file: reading on from it is reading on, in every variant; any other file is refused in one line."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from infini_train.config.errors import ConfigError
from infini_train.inference.generation import Conversation
from infini_train.inference.memory_files import Remembered, load_memory, save_memory
from infini_train.inference.sampling import Sampling
from infini_train.model.init import initialise
from infini_train.model.transformer import Transformer

GREEDY = {"stop_id": None, "sampling": Sampling(temperature=0)}


def model_of(config, seed=0):
    model = Transformer(config).eval()
    initialise(model, config, seed)
    return SimpleNamespace(model=model, tokenizer=SimpleNamespace(bos_id=1))


@pytest.fixture
def trained(tiny, process_groups):
    return model_of(tiny("gated-token"))


def text(first, last):
    return [(7 * number) % 39 + 1 for number in range(first, last)]


def keep(trained, path):
    """Reads 21 tokens, writes 2, and keeps what is remembered."""
    talk = Conversation(trained.model)
    written = list(talk.reply(text(0, 21), max_new_tokens=2, **GREEDY))
    assert len(written) == 2
    remembered = Remembered(*talk.remember())
    assert remembered.tokens == 23
    assert save_memory(path, trained, remembered) == path.stat().st_size
    return written


def change(path, edit):
    """Writes the file again with other tensors or facts."""
    with safe_open(path, framework="pt") as file:
        tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    edit(tensors, facts)
    save_file(tensors, path, metadata=facts)


def test_reading_on_from_a_file(variant, tiny, tmp_path, process_groups):
    trained = model_of(tiny(variant))
    written = keep(trained, tmp_path / "a.memory")
    whole = list(Conversation(trained.model).reply([*text(0, 21), *written, *text(21, 40)], max_new_tokens=9, **GREEDY))
    for _ in range(2):  # the file stays as it is
        before = load_memory(tmp_path / "a.memory", trained)
        assert list(Conversation(trained.model, *before).reply(text(21, 40), max_new_tokens=9, **GREEDY)) == whole


def test_turns_are_one_text(trained):
    talk, parts = Conversation(trained.model), []
    for first in (0, 10, 20):
        parts += text(first, first + 10)
        parts += talk.reply(text(first, first + 10), max_new_tokens=3, **GREEDY)
    again = Conversation(trained.model)
    assert list(again.reply(parts, max_new_tokens=0, **GREEDY)) == []
    (state, tokens), (other, count) = talk.remember(), again.remember()
    assert tokens == count == len(parts)
    for layer, same in zip(state, other, strict=True):
        torch.testing.assert_close(layer.memory.memory_BKDE, same.memory.memory_BKDE)


def test_another_model_is_refused(trained, tiny, tmp_path):
    keep(trained, tmp_path / "a.memory")
    for other in (model_of(tiny("gated-token"), seed=1), model_of(tiny("gated"))):
        with pytest.raises(ConfigError, match=r"^--memory: .*a\.memory is the memory of another model"):
            load_memory(tmp_path / "a.memory", other)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda tensors, facts: facts.update(format="x"), "was not written by --save-memory of this version"),
        (lambda tensors, facts: facts.update(tokens="-1"), "was not written by --save-memory of this version"),
        (lambda tensors, facts: tensors.popitem(), "is missing, or should not be there"),
        (lambda tensors, facts: tensors.update(x=torch.zeros(1)), "damaged: x is missing, or should not be there"),
        (lambda tensors, facts: grow(tensors, "0.memory.memory_BKDE", 2), "not torch.float32 of the model's sizes"),
        (lambda tensors, facts: cast(tensors, "0.memory.memory_BKDE"), "is torch.float64"),
        (lambda tensors, facts: tensors["0.memory.memory_BKDE"].fill_(torch.nan), "holds NaN or infinity"),
        (lambda tensors, facts: grow(tensors, "0.recent.k_BKRD", 2), "tokens of its open segment don't fit together"),
        (lambda tensors, facts: grow_all(tensors, "0.recent."), "tokens of its open segment don't fit together"),
        (lambda tensors, facts: grow(tensors, "0.recent.sinks.k_BKZD", 2), "its first tokens don't fit together"),
        (lambda tensors, facts: grow(tensors, "0.recent.sinks.v_BKZE", 2), "its first tokens don't fit together"),
        (lambda tensors, facts: tensors["0.recent.sinks.start_B"].fill_(5), "its first tokens don't fit together"),
    ],
)
def test_what_does_not_fit_is_refused(edit, problem, trained, tmp_path):
    keep(trained, tmp_path / "a.memory")
    change(tmp_path / "a.memory", edit)
    with pytest.raises(ConfigError, match=problem):
        load_memory(tmp_path / "a.memory", trained)


def grow(tensors, name, dim):
    tensors[name] = torch.cat((tensors[name], tensors[name]), dim)


def grow_all(tensors, prefix):
    """A longer open segment in one layer alone."""
    for name in [name for name in tensors if name.startswith(prefix) and "sinks" not in name]:
        dim = 2 if tensors[name].dim() == 4 else 1
        tensors[name] = torch.cat((tensors[name], tensors[name].narrow(dim, 0, 1)), dim)


def cast(tensors, name):
    tensors[name] = tensors[name].double()


def test_other_files(trained, tmp_path):
    for name, content in {"empty": b"", "torn": b"\x10\0\0\0\0\0\0\0{", "text": b"a text that is no memory"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} is damaged, or not written by --save-memory"):
            load_memory(tmp_path / name, trained)
    with pytest.raises(ConfigError, match="none can't be read: No such file"):
        load_memory(tmp_path / "none", trained)
    with pytest.raises(ConfigError, match=r"^--save-memory: .*can't be written: "):
        save_memory(tmp_path / "nowhere" / "a.memory", trained, Remembered((), 0))
