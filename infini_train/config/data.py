"""`data`: what is read."""

from dataclasses import dataclass
from typing import Annotated, Literal

from infini_train.config.errors import require
from infini_train.config.union import one_of
from infini_train.config.values import Factor, Few, FilePath, Many, Total

NeedleTask = Literal["single", "multikey", "multivalue", "multiquery", "variables"]
BabiTask = Literal["qa1", "qa2", "qa3", "qa4", "qa5"]
LEAST_FACTS = 3  # of a story in which something can be asked
VALUE_EACH: tuple[NeedleTask, ...] = ("multikey", "multivalue", "multiquery")  # with as many values as needles


def _check_pressure(pressure: float, share: float) -> None:
    require(pressure >= 1, "data.synthetic.pressure", "must be at least 1")
    require(0 <= share <= 1, "data.synthetic.pressure_share", "must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """One kind of texts that are made while training."""

    kind: str

    @property
    def tokenizer_file(self) -> str | None:
        """What the texts are encoded with; None: bytes."""
        return None


@dataclass(frozen=True, kw_only=True)
class PasskeyConfig(SyntheticConfig):
    """Texts that hide a number, made while training; a text never crosses a window (docs/passkey.md).

    They start short, grow once they are learned, and come under pressure when they have grown.
    """

    kind: Literal["passkey"] = "passkey"  # chooses these texts
    wording: str = "paper"  # words of intro, key and question (docs/passkey.md)
    varied_filler: bool = False  # filler drawn anew for each text, from sentences that no wording has
    varied_wording: bool = False  # half of the texts use random words around key and question, if they fit
    digits: Few = 5  # number of digits of the hidden number
    few_digits_below_loss: Factor | None = None  # once the loss is below this, numbers repeat digits; null: never
    min_segments: Many = 3  # length of the shortest texts, in segments
    grow_below_loss: Factor = 0.12  # texts grow, up to a window, while the running mean loss (nats) is below this
    text_weight: Factor = 1.0  # share of the loss for all text but the number
    answer_weight: Factor = 1.0  # share for the answer and the space before it
    key_weight: Factor = 0.5  # share for the second mention of the number
    pressure: Factor = 1.0  # scales write weights to simulate texts of up to N windows; 1: off, as in the paper
    pressure_share: Factor = 0.5  # share of the grown texts that get pressure

    def __post_init__(self) -> None:
        for name in ("digits", "min_segments", "grow_below_loss"):
            require(getattr(self, name) > 0, f"data.synthetic.{name}", "must be positive")
        few = self.few_digits_below_loss
        require(few is None or few > 0, "data.synthetic.few_digits_below_loss", "must be positive, or null for never")
        for name in ("text_weight", "answer_weight", "key_weight"):
            require(getattr(self, name) >= 0, f"data.synthetic.{name}", "must not be negative")
        require(
            self.text_weight + self.answer_weight + self.key_weight > 0,
            "data.synthetic.answer_weight",
            "some weight must be above 0",
        )
        _check_pressure(self.pressure, self.pressure_share)


@dataclass(frozen=True, kw_only=True)
class NeedlesConfig(SyntheticConfig):
    """Texts that hide several things, made while training (docs/needles.md)."""

    kind: Literal["needles"] = "needles"  # chooses these texts
    tasks: tuple[NeedleTask, ...] = ("multikey",)  # tasks to mix
    haystack: FilePath = "varied"  # varied, words, tokens, assorted, repeated, or a text or .jsonl file
    tokenizer: FilePath | None = None  # a .model or tokenizer.json; null: bytes
    needles: Many = 4  # maximum number of needles in a text, as far as they fit
    questions: Many = 1  # number of questions at a text's end, each about another needle; above 1 for multikey only
    digits: Few = 5  # number of digits of a value
    min_digits: Few | None = None  # each text draws its number of digits, from this up to digits; null: always digits
    varied_wording: bool = False  # half of the texts use random words around things, values and questions, if they fit
    min_segments: Many = 4  # length of the shortest texts, in segments
    grow_below_loss: Factor = 0.25  # texts grow, up to a window, while the running mean loss (nats) is below this
    text_weight: Factor = 0.1  # share of the loss for all text but the answers
    answer_weight: Factor = 1.0  # share for the answers
    pressure: Factor = 1.0  # scales write weights of grown texts to simulate up to N windows; 1: off
    pressure_share: Factor = 0.5  # share of the grown texts that get pressure

    def __post_init__(self) -> None:
        require(bool(self.tasks), "data.synthetic.tasks", "give at least one")
        for name in ("needles", "questions", "digits", "min_segments", "grow_below_loss", "answer_weight"):
            require(getattr(self, name) > 0, f"data.synthetic.{name}", "must be positive")
        require(self.text_weight >= 0, "data.synthetic.text_weight", "must not be negative")
        require(
            self.questions == 1 or "multikey" in self.tasks,
            "data.synthetic.questions",
            "only multikey has more than one; add it to data.synthetic.tasks",
        )
        least = self.digits if self.min_digits is None else self.min_digits
        require(0 < least <= self.digits, "data.synthetic.min_digits", "must lie between 1 and data.synthetic.digits")
        require(self.questions <= self.needles, "data.synthetic.questions", "can't be more than data.synthetic.needles")
        _check_pressure(self.pressure, self.pressure_share)
        require(
            self.needles <= 10**least or not set(VALUE_EACH) & set(self.tasks),
            "data.synthetic.digits" if self.min_digits is None else "data.synthetic.min_digits",
            f"there are not {self.needles} different values of so few digits; raise it, or lower"
            " data.synthetic.needles",
        )

    @property
    def tokenizer_file(self) -> str | None:
        return self.tokenizer


@dataclass(frozen=True, kw_only=True)
class BabilongConfig(SyntheticConfig):
    """Facts of bAbI tasks scattered in other text, made while training (docs/babilong.md)."""

    kind: Literal["babilong"] = "babilong"  # chooses these texts
    tasks: tuple[BabiTask, ...] = ("qa1",)  # tasks to mix
    haystack: FilePath = "varied"  # varied, words, tokens, assorted, repeated, or a text or .jsonl file
    tokenizer: FilePath | None = None  # a .model or tokenizer.json; null: bytes
    max_facts: Many = 10  # maximum number of facts in a text, as far as they fit
    questions: Many = 1  # maximum number of questions at a text's end, each a different one about the same facts
    min_segments: Many = 4  # length of the shortest texts, in segments
    grow_below_loss: Factor = 0.25  # texts grow, up to a window, while the running mean loss (nats) is below this
    text_weight: Factor = 0.1  # share of the loss for all text but the answers
    answer_weight: Factor = 1.0  # share for the answers
    pressure: Factor = 1.0  # scales write weights of grown texts to simulate up to N windows; 1: off
    pressure_share: Factor = 0.5  # share of the grown texts that get pressure

    def __post_init__(self) -> None:
        require(bool(self.tasks), "data.synthetic.tasks", "give at least one")
        require(
            self.max_facts >= LEAST_FACTS,
            "data.synthetic.max_facts",
            f"must be at least {LEAST_FACTS}",
        )
        for name in ("questions", "min_segments", "grow_below_loss", "answer_weight"):
            require(getattr(self, name) > 0, f"data.synthetic.{name}", "must be positive")
        require(self.text_weight >= 0, "data.synthetic.text_weight", "must not be negative")
        _check_pressure(self.pressure, self.pressure_share)

    @property
    def tokenizer_file(self) -> str | None:
        return self.tokenizer


@dataclass(frozen=True, kw_only=True)
class RecallConfig(SyntheticConfig):
    """Key-value pairs, then a question for each of them (docs/needles.md)."""

    kind: Literal["recall"] = "recall"  # chooses these texts
    min_pairs: Few = 2  # number of pairs in the smallest texts
    max_pairs: Few = 32  # number of pairs in the largest texts; they and their questions must fit into a window
    joined: bool = True  # a pair is one token; false: two tokens, its key and its value
    grow_below_loss: Factor = 0.3  # texts grow while the running mean loss (nats per value) is below this

    def __post_init__(self) -> None:
        require(self.min_pairs > 0, "data.synthetic.min_pairs", "must be positive")
        require(
            self.min_pairs <= self.max_pairs <= 128,
            "data.synthetic.max_pairs",
            f"must lie between min_pairs ({self.min_pairs}) and 128, the number of keys",
        )
        require(self.grow_below_loss > 0, "data.synthetic.grow_below_loss", "must be positive")


SYNTHETIC_KINDS: dict[str, type[SyntheticConfig]] = {
    "passkey": PasskeyConfig,
    "needles": NeedlesConfig,
    "recall": RecallConfig,
    "babilong": BabilongConfig,
}


# One of SYNTHETIC_KINDS, chosen by `kind`.
AnySyntheticConfig = Annotated[SyntheticConfig, one_of(SYNTHETIC_KINDS)]


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One of several datasets to train on, all encoded with the same tokenizer."""

    folder: FilePath  # folder or URL of its shards
    weight: Factor = 1.0  # its share of the tokens, relative to the weights of the others
    epochs: Many | None = None  # maximum number of passes; then the others take over its share; null: no limit

    def __post_init__(self) -> None:
        require(self.weight > 0, "data.mixture.weight", "must be positive; leave out what is not to be read")
        require(self.epochs is None or self.epochs > 0, "data.mixture.epochs", "must be positive, or null")


@dataclass(frozen=True, kw_only=True)
class LengthStage:
    """A stage of a length curriculum: documents that come first, in the first epoch."""

    tokens: Total  # length of the stage, in tokens
    max_document_tokens: Total  # longer documents come later

    def __post_init__(self) -> None:
        for name in ("tokens", "max_document_tokens"):
            require(getattr(self, name) > 0, f"data.curriculum.{name}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read: shards written by `infini-data encode`, in folders or at URLs, or texts made on the fly."""

    train: FilePath | None = None  # shards to train on; a relative path starts at the folder where the command runs
    mixture: tuple[MixturePart, ...] = ()  # several datasets to train on, instead of one
    curriculum: tuple[LengthStage, ...] = ()  # short documents first; each document still comes once per epoch
    # texts made on the fly, instead of shards
    synthetic: AnySyntheticConfig | None = None
    validation: FilePath | None = None  # held-out shards, for eval.every_steps and infini-train eval; null: none
    order_seed: int | None = None  # shuffles the documents; null: the run's seed
    cache_dir: FilePath | None = None  # for URLs (s3://...): a local folder with enough space for the shards
    max_corrupt_documents: Total = 100  # damaged documents are left out and counted; more than this many end the run

    def __post_init__(self) -> None:
        value = self.order_seed
        require(value is None or 0 <= value < 2**31, "data.order_seed", "must lie between 0 and 2147483647, or null")
        given = [self.train is not None, bool(self.mixture), self.synthetic is not None]
        require(
            sum(given) == 1,
            "data.train",
            "give a folder of shards to train on (or data.mixture or data.synthetic instead, one of them)",
        )
        require(
            self.synthetic is None or not self.curriculum,
            "data.curriculum",
            "data.synthetic has its own schedule of lengths",
        )
        require(self.max_corrupt_documents >= 0, "data.max_corrupt_documents", "must not be negative")
        for text in (self.train, self.validation, *(part.folder for part in self.mixture)):
            require(
                not (text or "").startswith("pipe:"),
                "data.train",
                "a pipe can't be shuffled or resumed; give a folder, or a URL and data.cache_dir",
            )
