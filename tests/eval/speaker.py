"""Stands where a model stands in tests of retrieval: what it says to each prompt is known beforehand. Over bytes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from infini_train.eval.retrieval import RetrievalPrompts


class Speaker:
    """Says what `speak` makes of a prompt and its text, then blanks."""

    def __init__(self, prompts: RetrievalPrompts, speak: Callable[[Any, Any], str]) -> None:
        self.config = SimpleNamespace(segment_tokens=16)
        self.said = {}
        for length in prompts.grid.lengths_tokens:
            for prompt in prompts.grid.prompts(length):
                text = prompts.write(prompt)
                self.said[bytes(text.read(0, text.prompt_tokens).tolist())] = speak(prompt, text)

    def make_grids(self, starts_BT, weights_BT, state):
        return self

    def to(self, device):
        return self

    def decode(self, tokens_BT, grid, state):
        seen_BT = tokens_BT if state is None else torch.cat((state[0], tokens_BT), 1)
        return torch.stack([self._next(lane) for lane in seen_BT.tolist()])[None], (seen_BT,)

    def prefill(self, tokens_BT, grid, state):
        return (tokens_BT if state is None else torch.cat((state[0], tokens_BT), 1),)

    def _next(self, seen: list[int]) -> torch.Tensor:
        text, token = bytes(seen[1:]), 0
        for prompt, said in self.said.items():
            if text.startswith(prompt):
                token = (said + " " * 199).encode()[len(text) - len(prompt)]
        return torch.nn.functional.one_hot(torch.tensor(token), 259).float()

    def logits(self, hidden_TBV):
        return hidden_TBV
