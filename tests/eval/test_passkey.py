"""Passkey tests of models: streaming changes nothing, and what scores is what was said, right or wrong."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from infini_train.data.synthetic.passkey import PasskeyWriter
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.eval import streaming
from infini_train.eval.generate import generate
from infini_train.eval.passkey import answer_grid, draw_text
from infini_train.eval.passkey_scores import PasskeyGrid, Prompt
from infini_train.eval.reading import remember
from infini_train.eval.sampling import Sampling
from infini_train.eval.scores import score_cells, summarise
from infini_train.eval.streaming import read_prompts

BOS = ByteTokenizer.bos_id
WRITER = PasskeyWriter(ByteTokenizer(), find_wording("paper"))


def grid_of(**changes) -> PasskeyGrid:
    return PasskeyGrid(**{"lengths_tokens": (300, 420), "positions": (0.0, 0.5, 1.0), "samples": 4, **changes})


# ----------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("lengths", [(260, 263, 257), (300, 300), (249,), (290, 250)])
def test_streaming_side_by_side_equals_a_prompt_alone(variant, lengths, tools):
    """The digits are those that `generate` writes behind the whole prompt."""
    model = tools.build(variant)
    random = np.random.default_rng(0)
    texts = [WRITER.compose(random, length, 0.5) for length in lengths]
    seen: list[int] = []
    found = read_prompts(model, texts, BOS, seen.append).said
    prompts = [[BOS, *text.ids[: text.spans.answer.start].tolist()] for text in texts]
    greedy = Sampling(temperature=0.0)
    expected = [list(generate(model, p, max_new_tokens=5, stop_id=None, sampling=greedy)) for p in prompts]
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
        return remember(model, tokens_BT, state)

    def see(model, rest, state, tokens, chunk_tokens):
        states.append(state)
        return [0] * tokens

    monkeypatch.setattr(streaming, "remember", count)
    monkeypatch.setattr(streaming, "_answer", see)
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


def test_speed_is_told_where_there_is_enough_to_measure(tools):
    model, random = tools.build("linear"), np.random.default_rng(0)
    found = read_prompts(model, [WRITER.compose(random, 600, 0)], BOS)
    assert found.start_tokens_per_s > 0 and found.end_tokens_per_s > 0
    reader = Reader(lambda key, said: "0", segment_tokens=200)
    assert read_prompts(reader, [WRITER.compose(random, 250, 0)], BOS).end_tokens_per_s is None


# --------------------------------------------------------------------------------------------------------- the oracles


class Reader:
    """Stands where a model stands: remembers what it read, finds the key in it, and answers by a rule.

    The rule takes the key and the digits said so far, and gives the next digit.
    """

    def __init__(self, rule: Callable[[str, str], str], segment_tokens: int = 16) -> None:
        self.config, self.rule = SimpleNamespace(segment_tokens=segment_tokens), rule

    def make_grids(self, starts_BT, weights_BT, state):
        assert starts_BT[:, 0].all() == (state is None) and not starts_BT[:, 1:].any() and (weights_BT == 1).all()
        return self

    def to(self, device):
        return self

    def prefill(self, tokens_BT, grid, state):
        return (tokens_BT if state is None else torch.cat((state[0], tokens_BT), 1),)

    def decode(self, tokens_BT, grid, state):
        (seen_BT,) = self.prefill(tokens_BT, grid, state)
        return torch.stack([self._next(lane) for lane in seen_BT.tolist()])[None], (seen_BT,)

    def _next(self, seen: list[int]) -> torch.Tensor:
        assert seen.count(BOS) == 1 and seen[0] == BOS
        text = bytes(seen[1:]).decode()
        _, asked, said = text.rpartition(" What is the pass key? The pass key is ")
        token = ord(self.rule(text.split("The pass key is ")[1][:5], said)) if asked else 0
        return torch.nn.functional.one_hot(torch.tensor(token), 259).float()

    def logits(self, hidden_TBV):
        return hidden_TBV


def score(rule: Callable[[str, str], str], **changes) -> dict:
    grid = grid_of(**changes)
    answers = [a for batch in answer_grid(Reader(rule), WRITER, grid, BOS, lanes=5) for a in batch]
    return summarise(grid, answers, 16)


def test_whoever_copies_the_key_gets_everything():
    found = score(lambda key, said: key[len(said)])
    assert found["complete"] and found["all"]["samples"] == 24 and found["all"]["digits"] == 120
    assert found["all"]["exact_match"] == found["all"]["digit_accuracy"] == 1.0
    assert {(cell["length_tokens"], cell["position"]) for cell in found["cells"]} == {
        (length, position) for length in (300, 420) for position in (0, 0.5, 1)
    }


def test_one_wrong_digit_is_no_exact_match():
    found = score(lambda key, said: "x" if len(said) == 3 else key[len(said)])
    assert found["all"]["exact_match"] == 0.0 and found["all"]["digit_accuracy"] == pytest.approx(0.8)
    assert found["all"]["exact_match_95"] == pytest.approx([0.0, 0.1380], abs=1e-4)


def test_an_error_is_read_back():
    """Right after right digits only: with the right digits shown to it, it would miss the first one alone."""
    found = score(lambda key, said: key[len(said)] if said and key.startswith(said) else "?")
    assert found["all"]["digit_accuracy"] == 0.0


def test_cells_are_told_apart():
    """Forgets keys with an odd first digit: exact where that is even."""
    grid = grid_of(samples=6)
    reader = Reader(lambda key, said: key[len(said)] if int(key[0]) % 2 == 0 else "0")
    answers = [a for batch in answer_grid(reader, WRITER, grid, BOS, lanes=4) for a in batch]
    cells = score_cells(grid, answers)
    for cell in grid.cells():
        keys = [a.key for a in answers if (a.length_tokens, a.position) == cell]
        assert cells[cell].exact == sum(int(key[0]) % 2 == 0 for key in keys) and len(keys) == 6
    assert 0 < sum(score.exact for score in cells.values()) < 36


# ---------------------------------------------------------------------------------------------------------- the prompts


@pytest.mark.parametrize("length", [250, 251, 270, 5000, 2**20])
@pytest.mark.parametrize("position", [0.0, 0.25, 1.0])
def test_prompts_fit_their_length_and_position(length, position):
    grid = grid_of(lengths_tokens=(length,), positions=(position,), samples=50)
    for prompt in grid.prompts(length):
        text = draw_text(WRITER, grid, prompt, 64)
        assert length - 64 < text.tokens + 1 <= length
        filler = text.tokens - WRITER.min_tokens
        before = text.spans.key.start - draw_text(WRITER, grid_of(), Prompt(250, 0.0, 0), 1).spans.key.start
        assert abs(before - position * filler) <= min(64, filler + 1)


def test_key_and_question_take_every_phase():
    """As many samples as a segment has tokens take most phases, three times as many take all, and most pairs."""
    grid = grid_of(lengths_tokens=(2000,), samples=96)
    for position in grid.positions:
        texts = [draw_text(WRITER, grid, Prompt(2000, position, sample), 32) for sample in range(96)]
        key = [text.spans.first_mention.start % 32 for text in texts]
        question = [text.spans.question.start % 32 for text in texts]
        assert set(key) == set(question) == set(range(32))
        assert len(set(key[:32])) >= 24 and len(set(question[:32])) >= 24
        assert len(set(zip(np.array(key) // 8, np.array(question) // 8, strict=True))) == 16
        assert len({text.digits for text in texts}) > 90


def test_a_prompt_does_not_depend_on_the_rest_of_the_grid():
    small, large = grid_of(samples=2), grid_of(lengths_tokens=(300,), positions=(0.5, 0.7), samples=9)
    prompt = Prompt(300, 0.5, 1)
    first, again = (draw_text(WRITER, grid, prompt, 16).ids.tolist() for grid in (small, large))
    assert first == again != draw_text(WRITER, grid_of(seed=1), prompt, 16).ids.tolist()
