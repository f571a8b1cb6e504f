"""Passkey tests of models: what scores is what was predicted, right or wrong, and prompts lie where they should."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infini_train.data.synthetic.passkey import PasskeyWriter
from infini_train.data.synthetic.wordings import find_wording
from infini_train.data.tokenizer import ByteTokenizer
from infini_train.eval.passkey import PasskeyGrid, PasskeyPrompt, PasskeyPrompts
from infini_train.eval.retrieval import answer_prompts, score_cells, summarise_answers
from infini_train.inference.streaming import read_prompts

BYTE = ByteTokenizer()
BOS = ByteTokenizer.bos_id
WRITER = PasskeyWriter(BYTE, find_wording("paper"))


def grid_of(**changes) -> PasskeyGrid:
    return PasskeyGrid(**{"lengths_tokens": (300, 420), "depths": (0.0, 0.5, 1.0), "samples": 4, **changes})


def prompts_of(segment_tokens: int, **changes) -> PasskeyPrompts:
    return PasskeyPrompts(grid_of(**changes), BYTE, segment_tokens)


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
    prompts = prompts_of(16, **changes)
    answers = [a for batch in answer_prompts(Reader(rule), prompts, lanes=5) for a in batch]
    return summarise_answers(prompts.grid, answers, 16)


def test_speed_needs_enough_to_measure():
    reader = Reader(lambda key, said: "0", segment_tokens=200)
    assert read_prompts(reader, [WRITER.compose(np.random.default_rng(0), 250, 0)], BOS).end_tokens_per_s is None


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
    prompts = prompts_of(16, samples=6)
    reader = Reader(lambda key, said: key[len(said)] if int(key[0]) % 2 == 0 else "0")
    answers = [a for batch in answer_prompts(reader, prompts, lanes=4) for a in batch]
    cells = score_cells(prompts.grid, answers)
    for cell in prompts.grid.cells():
        keys = [a.key for a in answers if (a.length_tokens, a.position) == cell]
        assert cells[cell].exact == sum(int(key[0]) % 2 == 0 for key in keys) and len(keys) == 6
    assert 0 < sum(score.exact for score in cells.values()) < 36


# ---------------------------------------------------------------------------------------------------------- the prompts


@pytest.mark.parametrize("length", [250, 251, 270, 5000, 2**20])
@pytest.mark.parametrize("position", [0.0, 0.25, 1.0])
def test_prompts_fit_their_length_and_position(length, position):
    prompts = prompts_of(64, lengths_tokens=(length,), depths=(position,), samples=50)
    first = prompts_of(1).write(PasskeyPrompt(250, 0.0, 0)).spans.key.start
    for prompt in prompts.grid.prompts(length):
        text = prompts.write(prompt)
        assert length - 64 < text.tokens + 1 <= length
        filler = text.tokens - WRITER.min_tokens
        before = text.spans.key.start - first
        assert abs(before - position * filler) <= min(64, filler + 1)


def test_key_and_question_take_every_phase():
    """As many samples as a segment has tokens take most phases, three times as many take all, and most pairs."""
    prompts = prompts_of(32, lengths_tokens=(2000,), samples=96)
    for position in prompts.grid.depths:
        texts = [prompts.write(PasskeyPrompt(2000, position, sample)) for sample in range(96)]
        key = [text.spans.first_mention.start % 32 for text in texts]
        question = [text.spans.question.start % 32 for text in texts]
        assert set(key) == set(question) == set(range(32))
        assert len(set(key[:32])) >= 24 and len(set(question[:32])) >= 24
        assert len(set(zip(np.array(key) // 8, np.array(question) // 8, strict=True))) == 16
        assert len({text.digits for text in texts}) > 90


def test_a_prompt_does_not_depend_on_the_rest_of_the_grid():
    small, large = prompts_of(16, samples=2), prompts_of(16, lengths_tokens=(300,), depths=(0.5, 0.7), samples=9)
    prompt = PasskeyPrompt(300, 0.5, 1)
    first, again = (prompts.write(prompt).ids.tolist() for prompts in (small, large))
    assert first == again != prompts_of(16, seed=1).write(prompt).ids.tolist()
