"""Words of synthetic texts: those of the tests, and training sentences that no test uses. Imports no torch."""

from dataclasses import dataclass

import numpy as np

from infini_train.config.errors import ConfigError


@dataclass(frozen=True)
class PasskeyText:
    """The words of a passkey text, joined by single spaces.

    Attributes:
        name: selects the wording.
        intro: start of the text.
        filler: sentences, repeated in this order.
        key: contains ``{key}`` twice.
        question: the answer follows it after a space.
    """

    name: str
    intro: str
    filler: tuple[str, ...]
    key: str
    question: str

    def __post_init__(self) -> None:
        assert self.filler and self.key.count("{key}") == 2


_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about"
    " the important information there."
)
_KEY = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "What is the pass key? The pass key is"


def _refill(name: str, *filler: str) -> PasskeyText:
    """The paper's words with other filler."""
    return PasskeyText(name, _INTRO, filler, _KEY, _QUESTION)


WORDINGS = {
    text.name: text
    for text in (
        _refill(  # arXiv 2404.07143, as in the landmark attention paper before it
            "paper",
            "The grass is green.",
            "The sky is blue.",
            "The sun is yellow.",
            "Here we go.",
            "There and back again.",
        ),
        _refill(
            "harbour",
            "Two boats left the harbour before dawn.",
            "Gulls followed them past the lighthouse.",
            "By noon the wind had turned.",
            "Nobody was in a hurry.",
        ),
        _refill(
            "kitchen",
            "She chopped an onion and put it in the pan.",
            "Water was boiling on the stove.",
            "Outside it had begun to rain.",
            "Dinner would be late once more.",
            "They did not mind.",
        ),
        _refill(
            "railway",
            "A train stopped at every village.",
            "Some people got off, others got on.",
            "Fields went by, then a forest, then fields.",
            "Tickets, please!",
        ),
        PasskeyText(  # no sentence of the paper's
            "vault",
            "Somewhere in the following pages a number is written down that opens a vault. Look out for it, since you"
            " will be asked for it at the end.",
            ("Rivers run to the sea.", "Old houses creak at night.", "A clock ticks in the hall.", "Time goes by."),
            "To open the vault, dial {key}. Do not forget: {key} opens the vault.",
            "Which number opens the vault? To open the vault, dial",
        ),
        PasskeyText(  # no question mark, and the question's last words are not those before the key
            "parcel",
            "Dear customer, thank you for writing to us. Somewhere below you are told a number. We need it.",
            (
                "Lorries are loaded at four.",
                "Cardboard keeps dry under plastic.",
                "Drivers drink tea, then leave.",
                "All day phones ring.",
            ),
            "Take note that your parcel was given {key} as its number; say {key} when you fetch it.",
            "Now please tell us how your parcel can be found. Its number was",
        ),
    )
}


def find_wording(name: str) -> PasskeyText:
    """The wording with this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in WORDINGS:
        raise ConfigError(f"{name}: no such wording; choose one of {', '.join(WORDINGS)}")
    return WORDINGS[name]


# Training filler: a few of these in any order, and never the filler of a test. Lengths, first words and punctuation
# differ, so that only the digits are worth attending to.
SENTENCES = (
    "Snow fell on the roofs all night.",
    "He closed the book and yawned.",
    "Who left the window open?",
    "A dog barked twice.",
    "My cousin grows tomatoes behind the garage.",
    "It is late.",
    "Bread, cheese and apples lay on the table.",
    "The meeting was moved to Thursday because half of the staff had a cold.",
    "Look at that!",
    "Copper turns green when it is left outside.",
    "Under the bridge somebody was playing a violin.",
    "She counted the stairs as she went up.",
    "Not much happened after that.",
    "Every morning the baker sweeps the pavement in front of his shop.",
    "We took the wrong road, of course.",
    "Lemons are sour; honey is sweet.",
    "Can you hear the engine?",
    "Large ships need deep water.",
    "In the attic they found letters, a lamp and an old uniform.",
    "Moths gathered around the light.",
    "I would rather walk.",
    "This jacket has no pockets.",
    "The teacher drew a circle on the board and waited.",
    "Queues were long, but nobody complained.",
    "Far away a bell rang.",
    "Paper burns quickly.",
    "Because of the fog no plane could land.",
    "Then the lights went out.",
    "Some birds never come back in spring.",
    "You should have seen the garden in June.",
    "Zinc, iron, lead: the shelves were full of samples.",
    "An hour passed.",
    "They painted the fence white and the door blue.",
    "Give it back to him, please.",
    "Our neighbour plays chess with his daughter on Sundays.",
    "No answer came.",
    "Wind turbines stood along the ridge like a row of giants.",
    "Her voice was calm.",
    "Just around the corner there is a small cinema.",
    "What a strange idea!",
    "Years ago this was a forest.",
    "The recipe asks for butter, flour, eggs and a pinch of salt.",
    "Both of them laughed.",
    "Ice covers the lake from December on.",
    "Keep the receipt.",
    "Few people know how the story ends.",
    "Rain again, and no umbrella.",
    "With a sigh the clerk stamped the form and put it on the pile.",
    "Xylophones are made of wood.",
    "At the market you get everything: fish, flowers, shoes, even clocks.",
    "Up on the hill the grass is dry by August.",
    "Lead the horse to the stable.",
    "It was only a shadow.",
    "Somewhere a door slammed.",
    "Justice is slow.",
    "Quiet streets, empty squares, closed shutters.",
    "Most of the passengers were asleep by then.",
    "Do not touch the paint.",
    "Very few of the letters ever reached the island.",
    "Old maps show a river here.",
    "Chalk is soft and granite is hard.",
    "Tell me about your journey.",
    "On Monday the museum stays closed.",
    "Yes, that is what she said.",
)

WORDS = tuple(sorted({word.strip(".,:;?!").lower() for sentence in SENTENCES for word in sentence.split()}))


def draw_words(random: np.random.Generator, least: int, most: int) -> str:
    """So many of `WORDS` in any order, joined by spaces."""
    return " ".join(map(str, random.choice(WORDS, random.integers(least, most + 1))))
