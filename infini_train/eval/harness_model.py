"""Models as lm-evaluation-harness sees them: `lm_eval.api.model.LM` over streamed reading. Needs the extra `harness`.

There is no window: a context of any length is read to its end, and a document's likelihood is that of all of its tokens
given all before them, so nothing is truncated or cut into rolling windows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from infini_train.config.errors import ConfigError
from infini_train.data.tokenizer import Tokenizer, decode_stream
from infini_train.inference.generation import continue_from
from infini_train.inference.reading import Tail, read_segments, score_tails
from infini_train.inference.sampling import Sampling
from infini_train.logs import progress_bar
from infini_train.model.transformer import Transformer

DEFAULT_NEW_TOKENS = 256  # where a task names no limit
GENERATION_KEYS = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}


class InfiniLM(TemplateLM):
    """A trained model as `lm_eval.simple_evaluate` takes it.

    Args:
        model: any variant, on its device.
        tokenizer: of the model.
        lanes: texts read side by side.
        seed: of sampled generations; each request has its own stream.
        end_ids: ids that end a generated text; none: the tokenizer's eos.
    """

    backend = "causal"
    tokenizer = None  # no chat template

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        lanes: int = 8,
        seed: int = 0,
        end_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.end_ids = end_ids or (tokenizer.eos_id,)
        self.model, self.text_tokenizer, self.lanes, self.seed = model, tokenizer, lanes, seed

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a document."""
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id that every document begins with, also one without a context."""
        return self.text_tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells request caches apart."""
        return self.text_tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, after bos unless `add_special_tokens` is False: in training every document begins with it."""
        bos = [] if add_special_tokens is False else [self.prefix_token_id]
        return bos + self.text_tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether greedy decoding would write it.

        Each context is read once, up to its last segment's edge, however many continuations it has.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(i)
        order = sorted(groups, key=len, reverse=True)
        with progress_bar(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for first in range(0, len(order), self.lanes):
                contexts = order[first : first + self.lanes]
                tails = read_segments(self.model, [np.array(context, np.int64) for context in contexts])
                members = [(tail, i) for context, tail in zip(contexts, tails, strict=True) for i in groups[context]]
                continued = [Tail(tail.state, np.append(tail.tokens, requests[i][2])) for tail, i in members]
                counts = [len(requests[i][2]) for _, i in members]
                scores = score_tails(self.model, continued, counts, lanes=self.lanes)
                for (_, i), score in zip(members, scores, strict=True):
                    found[i] = float(score.logprobs_N.sum(dtype=np.float64)), bool(score.greedy_N.all())
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                bar.update(len(members))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text after bos; every token sees all before it."""
        texts = [request.args[0] for request in requests]
        pairs = [(("", text), [self.prefix_token_id], self.tok_encode(text, False)) for text in texts]
        hook, self.cache_hook = self.cache_hook, type(self.cache_hook)(None)  # these are not loglikelihood's requests
        try:
            found = [score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm)]
        finally:
            self.cache_hook = hook
        for text, score in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, cut before the first of the strings that end it."""
        said = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].args[0]), reverse=True)
        with progress_bar(total=len(requests), desc="generate", disable=disable_tqdm) as bar:
            for first in range(0, len(order), self.lanes):
                batch = order[first : first + self.lanes]
                texts = [np.array(self.tok_encode(requests[i].args[0]), np.int64) for i in batch]
                for i, tail in zip(batch, read_segments(self.model, texts), strict=True):
                    said[i] = self._write(tail, requests[i].args[1], self.seed + i)
                    self.cache_hook.add_partial("generate_until", requests[i].args, said[i])
                    bar.update()
        return said

    def _write(self, tail: Tail, options: dict[str, Any], seed: int) -> str:
        unknown = options.keys() - GENERATION_KEYS
        if unknown:
            raise ConfigError(f"generation_kwargs: {', '.join(sorted(unknown))}: is not supported; remove it")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampled = options.get("do_sample", options.get("temperature", 0) > 0)
        sampling = Sampling(
            temperature=options.get("temperature", 1.0) if sampled else 0.0,
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k", 0),
            seed=seed,
        )
        limit = options.get("max_gen_toks", options.get("max_new_tokens", DEFAULT_NEW_TOKENS))
        ids = continue_from(
            self.model,
            tail.tokens.tolist(),
            tail.state,
            max_new_tokens=limit,
            stop_id=self.end_ids,
            sampling=sampling,
        )
        pieces = decode_stream(self.text_tokenizer, ids, before=tail.tokens.tolist())  # as they follow the context
        return _cut(_grow(pieces, stops), stops)


def _grow(pieces: Iterator[str], stops: Sequence[str]) -> str:
    """The text of the pieces, up to the one with which one of the stops is there."""
    text = ""
    for piece in pieces:
        text += piece
        if any(stop and stop in text for stop in stops):
            break
    return text


def _cut(text: str, stops: Sequence[str]) -> str:
    places = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(places)] if places else text
