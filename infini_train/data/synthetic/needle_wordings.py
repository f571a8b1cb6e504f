"""Words of the needle tests, and others that are drawn for a training text. Imports no torch."""

from dataclasses import dataclass

import numpy as np

from infini_train.config.errors import ConfigError
from infini_train.data.synthetic.wordings import draw_words


@dataclass(frozen=True)
class NeedleWording:
    """How things and their values are told and asked for.

    Attributes:
        name: selects the wording.
        needle: with ``{thing}`` and ``{value}``.
        one: asks for the value of one thing, ``{things}``; the answer follows it after a space.
        many: the same for several values or things.
    """

    name: str
    needle: str
    one: str
    many: str


PASS_KEY = NeedleWording(
    "pass_key",
    "The pass key of the {thing} is {value}. Remember it. {value} is the pass key of the {thing}.",
    "What is the pass key of the {things}? The pass key of the {things} is",
    "What are all the pass keys of the {things}? The pass keys of the {things} are",
)
NEEDLE_WORDINGS = {
    wording.name: wording
    for wording in (
        PASS_KEY,
        NeedleWording(  # as RULER tells them, arXiv 2404.06654
            "magic",
            "One of the special magic numbers for {thing} is: {value}.",
            "What is the special magic number for {things} mentioned in the provided text? The special magic number for"
            " {things} mentioned in the provided text is",
            "What are all the special magic numbers for {things} mentioned in the provided text? The special magic"
            " numbers for {things} mentioned in the provided text are",
        ),
        NeedleWording(  # the value comes first, and the question's last words are not those before it
            "locker",
            "Dial {value} to open the locker that has the {thing} on its door.",
            "Somebody wants to open the locker that has the {things} on its door. The right number is",
            "Somebody wants to open the lockers that have the {things} on their doors. The right numbers are",
        ),
    )
}


def find_needle_wording(name: str) -> NeedleWording:
    """The wording with this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in NEEDLE_WORDINGS:
        raise ConfigError(f"{name}: no such wording; choose one of {', '.join(NEEDLE_WORDINGS)}")
    return NEEDLE_WORDINGS[name]


def draw_needle_wording(random: np.random.Generator) -> NeedleWording:
    """Random words around thing and value, so that they are remembered whatever is said about them.

    The thing comes first: a value read before it has nothing yet that it could be remembered by. Half of them tell it
    once more, in the other order. Half of the questions end in the words before the value.
    """
    before, between, after = draw_words(random, 1, 5), draw_words(random, 0, 4), draw_words(random, 0, 3)
    there, back = _sentence(before, "{thing}", between, "{value}", after), _sentence("{value}", between, "{thing}")
    needle = f"{there} {back}" if random.random() < 0.5 else there
    asked = draw_words(random, 2, 5).capitalize()
    tail = f"{before} {{things}} {between}" if random.random() < 0.5 else draw_words(random, 1, 4)
    question = f"{asked} {{things}}? {tail.strip().capitalize()}"
    return NeedleWording("drawn", needle, question, question)


def _sentence(*parts: str) -> str:
    words = " ".join(part for part in parts if part)
    return f"{words[0].upper()}{words[1:]}."
