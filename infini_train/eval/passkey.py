"""The prompts of a passkey test, and a model's answers to them."""

from collections.abc import Callable, Collection, Iterator

import numpy as np

from infini_train.data.synthetic.passkey import Passkey, PasskeyWriter, choose_before
from infini_train.eval.passkey_scores import Answer, PasskeyGrid, Prompt
from infini_train.eval.reading import segment_of
from infini_train.eval.streaming import read_prompts
from infini_train.model.transformer import Transformer
from infini_train.parallel import device

# Multiples of these, modulo 1, fill the interval evenly, and in pairs the square: the golden ratio, the root of 2.
EVEN_STEPS = np.array([0.6180339887498949, 0.4142135623730951])


def draw_text(writer: PasskeyWriter, grid: PasskeyGrid, prompt: Prompt, segment_tokens: int) -> Passkey:
    """The text of a prompt: its key, and where key and question lie against the segment grid.

    Key and end take their phases from an evenly filling sequence, so that few samples cover a segment well, and more
    samples go on with it. The text is up to a segment shorter than the prompt's length: the question may lie across an
    edge, as in real prompts.

    Args:
        writer: of the wording and the tokenizer.
        grid: of the test; gives the seed.
        prompt: one of its prompts.
        segment_tokens: of the model.
    """
    longest = prompt.length_tokens - 1  # bos
    assert longest >= writer.min_tokens
    cell = [grid.seed, prompt.length_tokens, round(prompt.position * 1e9)]
    key_share, end_share = (np.random.default_rng(cell).random(2) + prompt.sample * EVEN_STEPS) % 1
    tokens = longest - int(end_share * min(segment_tokens, longest - writer.min_tokens + 1))
    filler = tokens - writer.min_tokens
    before = choose_before(filler, prompt.position, segment_tokens, 0.0)  # the first of the places to choose from
    before += (int(key_share * segment_tokens) - before) % segment_tokens % min(segment_tokens, filler + 1)
    key = np.random.default_rng([*cell, prompt.sample]).integers(0, 10, writer.digits)
    return writer.place(key, tokens, before)


def answer_grid(
    model: Transformer,
    writer: PasskeyWriter,
    grid: PasskeyGrid,
    bos_id: int,
    *,
    lanes: int,
    done: Collection[Prompt] = (),
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> Iterator[list[Answer]]:
    """Answers to the prompts of a grid, a batch at a time, shorter lengths first.

    Args:
        model: any variant, on its device.
        writer: of the grid's wording and digits.
        grid: which prompts.
        bos_id: begins each prompt.
        lanes: prompts of one length read side by side.
        done: prompts to leave out.
        on_progress: called with tokens read.
    """
    segment = segment_of(model)
    for length in sorted(grid.lengths_tokens):
        prompts = [prompt for prompt in grid.prompts(length) if prompt not in done]
        for batch in (prompts[first : first + lanes] for first in range(0, len(prompts), lanes)):
            texts = [draw_text(writer, grid, prompt, segment) for prompt in batch]
            reading = read_prompts(model, texts, bos_id, on_progress)
            yield [
                Answer(
                    **prompt._asdict(),
                    tokens=text.spans.answer.start + 1,
                    key_token=text.spans.first_mention.start + 1,
                    question_token=text.spans.question.start + 1,
                    key="".join(map(str, text.digits)),
                    said=writer.spell(said),
                    start_tokens_per_s=reading.start_tokens_per_s,
                    end_tokens_per_s=reading.end_tokens_per_s,
                    lanes=len(batch),
                    peak_memory_bytes=device.peak_memory_bytes(),
                )
                for prompt, text, said in zip(batch, texts, reading.said, strict=True)
            ]
