"""A text of RULER: head, items, tail and the room for an answer, as stretches of ids. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infini_train.data.synthetic.haystack import Stretch, read_stretches, stretch_of
from infini_train.data.synthetic.ruler.items import ItemEncoder, ItemHaystack
from infini_train.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class RulerText:
    """One prompt, without bos, and how much may be written after it: a `PromptText`.

    Attributes:
        references: what the answer should hold.
        prompt_tokens: all before the answer.
        answer_tokens: that the model may write.
        question_token: where the question starts.
        evidence_tokens: places of the items that hold the answer; empty where all of them count.
    """

    references: tuple[str, ...]
    prompt_tokens: int
    answer_tokens: int
    question_token: int
    evidence_tokens: tuple[int, ...]
    _stretches: tuple[Stretch, ...]

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 ids [start, stop) of the prompt."""
        assert 0 <= start <= stop <= self.prompt_tokens
        return read_stretches(self._stretches, start, stop)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around the items, and what is asked.

    Attributes:
        head: up to the first item.
        question: from the line after the last item to the end of the prompt.
        references: what the answer should hold.
        answer: a right answer, with the space before it.
        answer_tokens: that the model may write, if a right answer takes no more.
        gap: between the last item and the question.
    """

    head: str
    question: str
    references: tuple[str, ...]
    answer: str
    answer_tokens: int
    gap: str = "\n"

    def room(self, encoder: ItemEncoder) -> int:
        """Tokens for the answer: RULER's, or as many as a right answer takes in this tokenizer."""
        return max(self.answer_tokens, _count_after(encoder.tokenizer, ":", self.answer))


Part = range | str  # items of the haystack, or a text of its own


def lay_out(
    encoder: ItemEncoder, hay: ItemHaystack, frame: Frame, parts: Sequence[Part], evidence: Sequence[int] = ()
) -> RulerText:
    """The text of these parts.

    The first item is encoded with the head and the last one with the question, so that no boundary lies where a
    tokenizer has a token for a full stop with the line break after it.

    Args:
        encoder: of the items.
        hay: the items that ranges count.
        frame: around the parts.
        parts: at least two items in all.
        evidence: which items of the text hold the answer; those of a range are counted one by one.
    """
    parts = [part for part in parts if len(part)]
    first, parts = _pop(hay, parts, 0)
    last, parts = _pop(hay, parts, -1)
    wanted, places = set(evidence), []
    head = encoder.tokenizer.encode(f"{frame.head}{first}{encoder.back}")
    if 0 in wanted:
        places.append(len(encoder.tokenizer.encode(frame.head)))
    stretches, at, item = [stretch_of(head)], len(head), 1
    for part in parts:
        if isinstance(part, str):
            stretch = stretch_of(encoder.encode([part])[0])
            places += [at] if item in wanted else []
            item += 1
        else:
            begin = hay.offset(part.start)
            stretch = Stretch(hay, begin, hay.offset(part.stop) - begin)
            places += [at + hay.offset(part[i - item]) - begin for i in sorted(wanted) if item <= i < item + len(part)]
            item += len(part)
        stretches.append(stretch)
        at += stretch.tokens
    (tail,) = encoder.encode_after([f"{encoder.front}{last}{frame.gap}{frame.question}"])
    places += [at] if item in wanted else []
    prompt = at + len(tail)
    return RulerText(
        references=frame.references,
        prompt_tokens=prompt,
        answer_tokens=frame.room(encoder),
        question_token=prompt - _count_after(encoder.tokenizer, "\n", frame.question),
        evidence_tokens=tuple(places),
        _stretches=(*stretches, stretch_of(tail)),
    )


def _pop(hay: ItemHaystack, parts: Sequence[Part], end: int) -> tuple[str, list[Part]]:
    """The text of the first (0) or last (-1) item, and the parts without it."""
    rest = list(parts)
    part = rest.pop(end)
    if isinstance(part, str):
        return part, rest
    text, left = hay.text(part[end]), part[1:] if end == 0 else part[:-1]
    if len(left):
        rest.insert(0 if end == 0 else len(rest), left)
    return text, rest


def _count_after(tokenizer: Tokenizer, before: str, text: str) -> int:
    """Tokens of a text after another one."""
    return len(tokenizer.encode(before + text)) - len(tokenizer.encode(before))


def fits(text: RulerText, length_tokens: int) -> bool:
    """Whether bos, prompt and answer take no more than this."""
    return 1 + text.prompt_tokens + text.answer_tokens <= length_tokens
