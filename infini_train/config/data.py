"""`data`: what is read."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import FiniteFloat

from infini_train.config.errors import require

NeedleTask = Literal["single", "multikey", "multivalue", "multiquery", "variables"]
VALUE_EACH: tuple[NeedleTask, ...] = ("multikey", "multivalue", "multiquery")  # with as many values as needles


def _check_pressure(section: str, pressure: float, share: float) -> None:
    require(pressure >= 1, f"{section}.pressure", "must be at least 1")
    require(0 <= share <= 1, f"{section}.pressure_share", "must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig:
    """Texts with a number to remember, made while training; a text never crosses a window (docs/passkey.md).

    They begin short, grow once they are learned, and come under pressure when they have grown.
    """

    wording: str = "paper"  # of intro, key and question
    varied_filler: bool = False  # sentences that no wording has, drawn anew for each text, in place of the wording's
    varied_wording: bool = False  # half of the texts have words in any order there, if they fit, drawn anew for each
    digits: int = 5  # of the number
    few_digits_below_loss: FiniteFloat | None = None  # once the loss is below, numbers repeat digits; null: never
    min_segments: int = 3  # of the shortest texts
    grow_below_loss: FiniteFloat = 0.12  # texts grow, up to a window, while the loss (nats, running mean) is below this
    text_weight: FiniteFloat = 1.0  # share in the loss of all text but the number
    answer_weight: FiniteFloat = 1.0  # of the answer, and the space before it
    key_weight: FiniteFloat = 0.5  # of the number's second mention
    pressure: FiniteFloat = 1.0  # texts feel up to so many windows long, by their write weights; 1: the paper's form
    pressure_share: FiniteFloat = 0.5  # of the texts that are put under pressure

    def __post_init__(self) -> None:
        for name in ("digits", "min_segments", "grow_below_loss"):
            require(getattr(self, name) > 0, f"data.passkey.{name}", "must be positive")
        few = self.few_digits_below_loss
        require(few is None or few > 0, "data.passkey.few_digits_below_loss", "must be positive, or null for never")
        for name in ("text_weight", "answer_weight", "key_weight"):
            require(getattr(self, name) >= 0, f"data.passkey.{name}", "must not be negative")
        require(
            self.text_weight + self.answer_weight + self.key_weight > 0,
            "data.passkey.answer_weight",
            "some weight must be above 0",
        )
        _check_pressure("data.passkey", self.pressure, self.pressure_share)


@dataclass(frozen=True, kw_only=True)
class NeedlesConfig:
    """Texts with several things to remember, made while training (docs/needles.md)."""

    tasks: tuple[NeedleTask, ...] = ("multikey",)  # mixed
    haystack: str = "varied"  # varied, repeated, or a text or .jsonl file
    tokenizer: str | None = None  # a .model or tokenizer.json; null: bytes
    needles: int = 4  # at most so many in a text, as far as they fit
    questions: int = 1  # behind a text, for other needles each; only multikey has more than one
    digits: int = 5  # of a value
    min_segments: int = 4  # of the shortest texts
    grow_below_loss: FiniteFloat = 0.25  # texts grow, up to a window, while the loss (running mean) is below this
    text_weight: FiniteFloat = 0.1  # share in the loss of all text but the answer
    answer_weight: FiniteFloat = 1.0  # of the answer
    pressure: FiniteFloat = 1.0  # grown texts feel up to so many windows long, by their write weights; 1: none
    pressure_share: FiniteFloat = 0.5  # of the texts that are put under pressure

    def __post_init__(self) -> None:
        require(bool(self.tasks), "data.needles.tasks", "give at least one")
        for name in ("needles", "questions", "digits", "min_segments", "grow_below_loss", "answer_weight"):
            require(getattr(self, name) > 0, f"data.needles.{name}", "must be positive")
        require(self.text_weight >= 0, "data.needles.text_weight", "must not be negative")
        require(
            self.questions == 1 or "multikey" in self.tasks,
            "data.needles.questions",
            "only multikey has more than one; add it to data.needles.tasks",
        )
        require(self.questions <= self.needles, "data.needles.questions", "there are not so many needles to ask for")
        _check_pressure("data.needles", self.pressure, self.pressure_share)
        require(
            self.needles <= 10**self.digits or not set(VALUE_EACH) & set(self.tasks),
            "data.needles.digits",
            f"there are not {self.needles} different values of so few digits; raise it, or lower data.needles.needles",
        )


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Pairs of a key and a value, then questions for all of them (docs/needles.md)."""

    min_pairs: int = 2  # of the smallest texts
    max_pairs: int = 32  # of the largest; they and their questions must fit into a window
    joined: bool = field(default=True, repr=False)  # a pair is one token; false: two, its key and its value
    grow_below_loss: FiniteFloat = 0.3  # texts grow while the loss (nats a value, running mean) is below this

    def __post_init__(self) -> None:
        require(self.min_pairs > 0, "data.recall.min_pairs", "must be positive")
        require(
            self.min_pairs <= self.max_pairs <= 128,
            "data.recall.max_pairs",
            f"must lie between min_pairs ({self.min_pairs}) and 128, the number of keys",
        )
        require(self.grow_below_loss > 0, "data.recall.grow_below_loss", "must be positive")


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One of several datasets to train on, all encoded with the same tokenizer."""

    folder: str  # of its shards, or their URL
    weight: FiniteFloat = 1.0  # its share of the tokens, relative to the other parts' weights
    epochs: int | None = None  # at most so many passes; then the others share its place; null: no limit

    def __post_init__(self) -> None:
        require(self.weight > 0, "data.mixture.weight", "must be positive; leave out what is not to be read")
        require(self.epochs is None or self.epochs > 0, "data.mixture.epochs", "must be positive, or null")


@dataclass(frozen=True, kw_only=True)
class LengthStage:
    """Documents that come first, in the first epoch: a stage of a curriculum of lengths."""

    tokens: int  # length of the stage
    max_document_tokens: int  # longer documents come later

    def __post_init__(self) -> None:
        for name in ("tokens", "max_document_tokens"):
            require(getattr(self, name) > 0, f"data.curriculum.{name}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read: shards written by `infini-data encode`, in folders or at URLs, or texts made while training."""

    train: str | None = None  # shards to train on; a relative path starts at the folder where the command runs
    mixture: tuple[MixturePart, ...] = ()  # several datasets to train on, instead of one
    curriculum: tuple[LengthStage, ...] = ()  # short documents first; each document still comes once an epoch
    passkey: PasskeyConfig | None = None  # texts to train on instead of shards
    needles: NeedlesConfig | None = None  # texts with several things to remember, instead of shards
    recall: RecallConfig | None = None  # key-value pairs to train on instead of shards
    validation: str | None = None  # held-out shards, for eval.every_steps and infini-train eval; null: none
    order_seed: int | None = None  # shuffles the documents; null: the run's seed
    cache_dir: str | None = None  # for URLs (s3://...): a folder of this machine with room for the shards
    max_corrupt_documents: int = 100  # damaged documents are left out and counted; more than these end the run

    def __post_init__(self) -> None:
        value = self.order_seed
        require(value is None or 0 <= value < 2**31, "data.order_seed", "must lie between 0 and 2147483647, or null")
        made = {"passkey": self.passkey, "needles": self.needles, "recall": self.recall}
        given = [self.train is not None, bool(self.mixture), *(texts is not None for texts in made.values())]
        require(
            sum(given) == 1,
            "data.train",
            "give a folder of shards to train on (or data.mixture or data.passkey instead, one of them)",
        )
        for name, texts in made.items():
            require(texts is None or not self.curriculum, "data.curriculum", f"data.{name} has lengths of its own")
        require(self.max_corrupt_documents >= 0, "data.max_corrupt_documents", "must not be negative")
        for text in (self.train, self.validation, *(part.folder for part in self.mixture)):
            require(
                not (text or "").startswith("pipe:"),
                "data.train",
                "a pipe can't be shuffled or resumed; give a folder, or a URL and data.cache_dir",
            )
