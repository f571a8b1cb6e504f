"""Prompts read side by side: streaming changes nothing, and a common beginning is read once."""

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from infini_train.data.synthetic.passkey import PasskeyWriter
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.inference import streaming
from infini_train.inference.generation import continue_from
from infini_train.inference.reading import prefill
from infini_train.inference.sampling import Sampling
from infini_train.inference.streaming import read_prompts

BOS = ByteTokenizer.bos_id
WRITER = PasskeyWriter(ByteTokenizer(), find_wording("paper"))


@pytest.mark.parametrize("lengths", [(260, 263, 257), (300, 300), (249,), (290, 250)])
def test_streaming_side_by_side_equals_a_prompt_alone(variant, lengths, tools):
    """The digits are those that `generate` writes after the whole prompt."""
    model = tools.build(variant)
    random = np.random.default_rng(0)
    texts = [WRITER.compose(random, length, 0.5) for length in lengths]
    seen: list[int] = []
    found = read_prompts(model, texts, BOS, seen.append).predicted
    prompts = [[BOS, *text.ids[: text.spans.answer.start].tolist()] for text in texts]
    greedy = Sampling(temperature=0.0)
    expected = [list(continue_from(model, p, None, max_new_tokens=5, stop_id=None, sampling=greedy)) for p in prompts]
    assert found == expected
    assert sum(seen) == sum(map(len, prompts))
    assert len(set(found[0])) > 1, "a model that repeats itself would show nothing"


def test_a_common_beginning_is_read_once(variant, tools, monkeypatch):
    """All share the intro, some the filler before a late key, two everything; each lane ends as it ends alone."""
    model, random = tools.build(variant), np.random.default_rng(0)
    filler = 500 if model.config.segment_tokens else 3500
    length, keys = WRITER.min_tokens + filler, random.integers(0, 10, (4, 5))
    late = [WRITER.place(key, length, filler - (100 if model.config.segment_tokens else 1000)) for key in keys[:3]]
    texts = [late[0], WRITER.place(keys[3], length, 0), late[1], late[0], late[2]]
    rows: list[int] = []
    states: list[object] = []

    def count(model, tokens_BT, state):
        rows.append(len(tokens_BT))
        return prefill(model, tokens_BT, state)

    def see(model, rest, state, *, max_new_tokens, **options):
        states.append(state)
        return [0] * max_new_tokens

    monkeypatch.setattr(streaming, "prefill", count)
    monkeypatch.setattr(streaming, "continue_from", see)
    read_prompts(model, texts, BOS)
    assert sorted(rows) == rows and rows[0] < 4 and rows[-1] == 4, rows
    together = [tensors_of(state) for state in states]
    states.clear()
    for text in texts:
        read_prompts(model, [text], BOS)
    for mine, alone in zip(together, map(tensors_of, states), strict=True):
        torch.testing.assert_close(mine, alone)
    if model.config.attention.kind in ("infini", "full", "rmt"):  # the others have forgotten the key by the end
        for one, other in ((0, 1), (0, 2), (2, 4)):
            pairs = zip(together[one], together[other], strict=True)
            assert any(not torch.allclose(a, b) for a, b in pairs), "a blind test"


def tensors_of(state) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def test_rows_split_where_texts_part():
    """Five lanes: all alike, then three rows, then lanes of one row part again; the state's rows go along."""
    pieces = [np.array([n]) for n in (7, 8, 7, 9, 8)]
    state, rows, tokens_RT = streaming._split_rows(None, [0] * 5, pieces)
    assert state is None and rows == [0, 1, 0, 2, 1] and tokens_RT[:, 0].tolist() == [7, 8, 9]
    state = (torch.tensor([10, 20, 30]), "no tensor")
    same, rows, tokens_RT = streaming._split_rows(state, rows, [np.array([1])] * 5)
    assert same is state and rows == [0, 1, 0, 2, 1] and tokens_RT[:, 0].tolist() == [1, 1, 1]
    state, rows, tokens_RT = streaming._split_rows(state, rows, [np.array([n]) for n in (1, 1, 2, 1, 1)])
    assert state[0].tolist() == [10, 20, 10, 30] and state[1] == "no tensor"
    assert rows == [0, 1, 2, 3, 1] and tokens_RT[:, 0].tolist() == [1, 1, 2, 1]


def test_speeds_are_those_of_the_commonest_size():
    forwards = [(1, 9.0), (1, 5.0), *[(2, 0.25 + 0.25 * (i > 10)) for i in range(20)], (3, 1.0)]
    assert streaming._speeds(forwards) == (4.0, 2.0)
    assert streaming._speeds(forwards[:1]) == (None, None)


def test_speed_is_measured_where_there_is_enough_to_measure(tools):
    model, random = tools.build("linear"), np.random.default_rng(0)
    found = read_prompts(model, [WRITER.compose(random, 600, 0)], BOS)
    assert found.start_tokens_per_s > 0 and found.end_tokens_per_s > 0
