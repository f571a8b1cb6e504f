"""`data`: what is read."""

from dataclasses import dataclass

from pydantic import FiniteFloat

from infini_train.config.errors import require


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig:
    """Texts with a number to remember, made while training; a text never crosses a window (docs/passkey.md).

    They begin short, grow as they are learned, and come under pressure when they have grown.
    """

    wording: str = "paper"  # of text and question
    varied_filler: bool = False  # sentences that no wording has, drawn anew for each text, in place of the wording's
    digits: int = 5  # of the number
    few_digits: bool = False  # when texts have grown they begin short again, with numbers that repeat digits
    min_segments: int = 3  # of the shortest texts
    grow_below_loss: FiniteFloat = 0.12  # texts grow, up to a window, while the loss (nats, running mean) is below this
    text_weight: FiniteFloat = 1.0  # share in the loss of all text but the number
    answer_weight: FiniteFloat = 1.0  # of the answer
    key_weight: FiniteFloat = 0.5  # of the number's second mention
    pressure: FiniteFloat = 1.0  # texts feel up to so many windows long, by their write weights; 1: the paper's form
    pressure_share: FiniteFloat = 0.5  # of the texts that are put under pressure

    def __post_init__(self) -> None:
        for name in ("digits", "min_segments", "grow_below_loss"):
            require(getattr(self, name) > 0, f"data.passkey.{name}", "must be positive")
        for name in ("text_weight", "answer_weight", "key_weight"):
            require(getattr(self, name) >= 0, f"data.passkey.{name}", "must not be negative")
        require(
            self.text_weight + self.answer_weight + self.key_weight > 0,
            "data.passkey.answer_weight",
            "some weight must be above 0",
        )
        require(self.pressure >= 1, "data.passkey.pressure", "must be at least 1")
        require(0 <= self.pressure_share <= 1, "data.passkey.pressure_share", "must lie between 0 and 1")


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
    validation: str | None = None  # held-out shards, for eval.every_steps and infini-train eval; null: none
    order_seed: int | None = None  # shuffles the documents; null: the run's seed
    cache_dir: str | None = None  # for URLs (s3://...): a folder of this machine with room for the shards
    max_corrupt_documents: int = 100  # damaged documents are left out and counted; more than these end the run

    def __post_init__(self) -> None:
        value = self.order_seed
        require(value is None or 0 <= value < 2**31, "data.order_seed", "must lie between 0 and 2147483647, or null")
        given = [self.train is not None, bool(self.mixture), self.passkey is not None]
        require(
            sum(given) == 1,
            "data.train",
            "give a folder of shards to train on (or data.mixture or data.passkey instead, one of them)",
        )
        require(self.passkey is None or not self.curriculum, "data.curriculum", "data.passkey has lengths of its own")
        require(self.max_corrupt_documents >= 0, "data.max_corrupt_documents", "must not be negative")
        for text in (self.train, self.validation, *(part.folder for part in self.mixture)):
            require(
                not (text or "").startswith("pipe:"),
                "data.train",
                "a pipe can't be shuffled or resumed; give a folder, or a URL and data.cache_dir",
            )
