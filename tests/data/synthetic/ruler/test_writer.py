"""All tasks: lengths are kept and used, ids are those of the text as a whole, and only the seed decides."""

import numpy as np
import pytest

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.ruler.tasks import QUESTION_TASKS, TASKS, NeedleTask
from infini_train.data.synthetic.ruler.writer import RulerWriter
from infini_train.data.tokenizer import ByteTokenizer

PREFIXES = {
    "niah": " mentioned in the provided text ",
    "vt": ", they are:",
    "cwe": "Answer: The top 10 words that appear most often in the list are:",
    "fwe": "Answer: According to the coded text above, the three most frequently appeared words are:",
    "qa": " Answer:",
}
LARGEST_ITEM_TOKENS = 200  # what may be left of a length: less than a line, a sentence, a word or a document


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length_tokens", [2048, 5000, 16384])
def test_lengths_are_kept_and_used_and_windows_are_the_whole_text(writer, read_whole, tokenizer, name, length_tokens):
    for sample in range(2):
        draft = writer.draft(name, length_tokens, sample, [7, sample])
        text = draft.place(length_tokens)
        used = 1 + text.prompt_tokens + text.answer_tokens
        assert draft.min_tokens <= used <= length_tokens
        assert used > length_tokens - LARGEST_ITEM_TOKENS * (3 if name == "cwe" else 1)
        whole = read_whole(text)
        assert PREFIXES[name.split("_")[0]] in whole[-150:] and not whole.endswith(" ")
        question = tokenizer.decode(text.read(text.question_token, text.prompt_tokens))
        assert whole.endswith(question) and question.startswith(("Which special", "Question: ", "Answer the question"))
        assert len(set(text.references)) == len(text.references)


@pytest.mark.parametrize("name", TASKS)
def test_the_smallest_length_works_and_the_answer_has_room(writer, read_whole, tokenizer, name):
    draft = writer.draft(name, 3000, 1, [3])
    text = draft.place(draft.min_tokens)
    assert 1 + text.prompt_tokens + text.answer_tokens <= draft.min_tokens
    read_whole(text)
    said = " ".join(text.references[:1] if name in QUESTION_TASKS else text.references)
    assert max(len(tokenizer.encode(said)), TASKS[name].answer_tokens) <= text.answer_tokens


@pytest.mark.parametrize("name", TASKS)
def test_only_the_seed_decides(name, questions):
    writers = [RulerWriter(ByteTokenizer(), None, dict.fromkeys(QUESTION_TASKS, questions)) for _ in range(2)]
    writers[1].draft(name, 4096, 0, [9, 9]).place(9000)  # what was written before does not
    first, second = (each.draft(name, 3000, 4, [1, 2]).place(3000) for each in writers)
    np.testing.assert_array_equal(first.read(0, first.prompt_tokens), second.read(0, second.prompt_tokens))
    assert first.references == second.references
    other = writers[0].draft(name, 3000, 4, [1, 3]).place(3000)
    assert bytes(other.read(0, other.prompt_tokens).tolist()) != bytes(first.read(0, first.prompt_tokens).tolist())


def test_a_million_tokens_are_read_at_any_place_without_the_rest(writer):
    name = "niah_multikey_1"
    assert isinstance(TASKS[name], NeedleTask)
    text = writer.draft(name, 2**20, 0, [5]).place(2**20)
    assert 2**20 - LARGEST_ITEM_TOKENS < 1 + text.prompt_tokens + text.answer_tokens <= 2**20
    window = text.read(500_000, 500_050)
    np.testing.assert_array_equal(window, text.read(499_000, 501_000)[1000:1050])


def test_a_tokenizer_that_joins_lines_is_refused(questions):
    class Joining(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.replace("\nT", "#"))

    with pytest.raises(ConfigError, match="tokenizer: joins the end of a line or sentence with the next"):
        RulerWriter(Joining(), None, {}).draft("niah_single_1", 2048, 0, [0])
