"""A reader of bAbI sentences, written without a look at what makes them."""

import re
from collections.abc import Callable

import pytest

from infini_train.data.synthetic.babi import OBJECTS

MOVE = re.compile(r"(\w+) (?:moved|went|went back|journeyed|travelled) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:got|grabbed|picked up|took) the (\w+)(?: there)?\.")
DROP = re.compile(r"(\w+) (?:discarded|dropped|left|put down) the (\w+)(?: there)?\.")
GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
BESIDE = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)\.")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Reader:
    """What the sentences say; fails where they contradict each other."""

    def __init__(self, facts: tuple[str, ...]) -> None:
        self.places: dict[str, str] = {}
        self.holders: dict[str, str] = {}
        self.been: dict[str, list[str]] = {thing: [] for thing in OBJECTS}
        self.gifts: list[tuple[str, str, str]] = []
        self.beside: dict[tuple[str, str], str] = {}  # (direction, of what): what lies there
        for fact in facts:
            ((read, match),) = [
                (read, match)
                for form, read in (
                    (MOVE, self.move),
                    (TAKE, self.take),
                    (DROP, self.drop),
                    (GIVE, self.give),
                    (BESIDE, self.lie),
                )
                if (match := form.fullmatch(fact))
            ]
            read(*match.groups())

    def move(self, person: str, place: str) -> None:
        assert self.places.get(person) != place
        self.places[person] = place
        for thing, holder in self.holders.items():
            if holder == person:
                self.been[thing].append(place)

    def take(self, person: str, thing: str) -> None:
        assert thing not in self.holders
        self.holders[thing] = person
        if person in self.places and not self.been[thing]:
            self.been[thing].append(self.places[person])
        assert not self.been[thing] or self.been[thing][-1] == self.places[person], "it lies elsewhere"

    def drop(self, person: str, thing: str) -> None:
        assert self.holders.pop(thing) == person

    def give(self, giver: str, thing: str, receiver: str) -> None:
        assert self.holders[thing] == giver != receiver
        assert {giver, receiver} - set(self.places) or self.places[giver] == self.places[receiver]
        self.holders[thing] = receiver
        self.gifts.append((giver, thing, receiver))

    def lie(self, low: str, direction: str, high: str) -> None:
        self.beside[direction, high], self.beside[OPPOSITE[direction], low] = low, high

    def answer(self, question: str) -> str:
        forms = {
            r"Where is (?!the )(\w+)\?": lambda person: self.places[person],
            r"Where is the (\w+)\?": lambda thing: self.been[thing][-1],
            r"Where was the (\w+) before the (\w+)\?": self.find_before,
            r"What is (\w+) of the (\w+)\?": lambda direction, place: self.beside[direction, place],
            r"What is the (\w+) (\w+) of\?": lambda place, direction: self.beside[OPPOSITE[direction], place],
            r"What did (\w+) give to (\w+)\?": lambda giver, receiver: self.find_gift(giver, None, receiver)[1],
            r"Who did (\w+) give the (\w+) to\?": lambda giver, thing: self.find_gift(giver, thing, None)[2],
            r"Who gave the (\w+) to (\w+)\?": lambda thing, receiver: self.find_gift(None, thing, receiver)[0],
            r"Who gave the (\w+)\?": lambda thing: self.find_gift(None, thing, None)[0],
            r"Who received the (\w+)\?": lambda thing: self.find_gift(None, thing, None)[2],
        }
        ((find, match),) = [(forms[form], match) for form in forms if (match := re.fullmatch(form, question))]
        return find(*match.groups())

    def find_before(self, thing: str, place: str) -> str:
        past = self.been[thing]
        return past[max(i for i, at in enumerate(past) if at == place and i) - 1]

    def find_gift(self, *known: str | None) -> tuple[str, str, str]:
        return [g for g in self.gifts if all(k in (None, part) for k, part in zip(known, g, strict=True))][-1]


@pytest.fixture(scope="session")
def read_facts() -> Callable[[tuple[str, ...]], Reader]:
    """What facts say, from the sentences alone."""
    return Reader
