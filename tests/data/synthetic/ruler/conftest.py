"""Tokenizers of three kinds, a file of questions, and texts read whole."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from infini_train.data.synthetic.ruler.layout import RulerText
from infini_train.data.synthetic.ruler.questions import QuestionFile, read_questions
from infini_train.data.synthetic.ruler.writer import RulerWriter
from infini_train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

MODELS = Path(__file__).resolve().parents[4] / "models"
# As Llama 3 and GPT-4 cut texts: a full stop and the line break after it become one token.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_bpe(path: Path) -> Tokenizer:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    texts = ["There and back again.\nThe grass is green.\n\nDocument 12:\nIt is. ... ...\nQuestion: 3. word\n"] * 50
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    assert ".\u010a" in model.get_vocab(), "the reason for this tokenizer"
    model.save(str(path))
    return load_tokenizer(path, (0, 1, 1))


@pytest.fixture(scope="session", params=["byte", "sentencepiece", "bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "byte":
        return ByteTokenizer()
    if request.param == "sentencepiece":
        return load_tokenizer(MODELS / "needles-linear" / "tokenizer.model")
    pytest.importorskip("tokenizers")
    return train_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> QuestionFile:
    """Thirty questions; of each third, two documents hold the answer."""
    path = tmp_path_factory.mktemp("qa") / "rooms.jsonl"
    lines = [
        {
            "question": f"Where is item {i}?",
            "answers": [f"room {i}", f"the room with number {i}", f"room {i}"],
            "context": [f"Item {i} is in room {i}. It is blue.", f"Room {i} is on floor {i % 5}."][: 1 + (i % 3 == 0)],
            "group": f"group {i % 10}",
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_questions(path)


@pytest.fixture(scope="session")
def writer(tokenizer: Tokenizer, questions: QuestionFile) -> RulerWriter:
    return RulerWriter(tokenizer, None, {"qa_1": questions, "qa_2": questions})


@pytest.fixture(scope="session")
def read_whole(tokenizer: Tokenizer) -> Callable[[RulerText], str]:
    """Reads a prompt in uneven windows, and checks that they are the ids of the text made whole."""

    def read(text: RulerText) -> str:
        cuts = [0, *np.random.default_rng(0).integers(0, text.prompt_tokens, 9), text.prompt_tokens]
        cuts = sorted(int(cut) for cut in cuts)
        ids = np.concatenate([text.read(*window) for window in zip(cuts, cuts[1:], strict=False)])
        whole = tokenizer.decode(ids)
        np.testing.assert_array_equal(ids, tokenizer.encode(whole))
        assert len(ids) == text.prompt_tokens
        return whole

    return read
