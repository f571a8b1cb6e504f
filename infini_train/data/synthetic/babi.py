"""Stories of the bAbI tasks QA1 to QA5 (Weston et al., arXiv 1502.05698): facts, and questions that follow from them.

| task | facts | asked |
|---|---|---|
| qa1 | people move | where a person is |
| qa2 | people move, take and drop objects | where an object is |
| qa3 | the same | where an object was before it came to where it is |
| qa4 | two places lie beside a third one | what lies there, or what it lies beside |
| qa5 | people move, take objects and give them away | who gave what to whom |

A world is simulated, as in the published generator, and its events are put in the published words. Every answer
is one word, and follows from the facts alone: only people whose place was mentioned touch the objects of qa2 and qa3.
Imports no torch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar, get_args

import numpy as np

from infini_train.config.data import LEAST_FACTS, BabiTask

TASKS: tuple[BabiTask, ...] = get_args(BabiTask)
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")  # the people of qa5
OBJECTS = ("apple", "football", "milk")
ANSWERS: dict[BabiTask, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": (*GIVERS, *OBJECTS),
}

_MOVES = ("moved", "went", "went back", "journeyed", "travelled")
_TAKES = ("got", "grabbed", "picked up", "took")
_DROPS = ("discarded", "dropped", "left", "put down")
_GIVES = ("gave", "handed", "passed")
_OPPOSITES = {"north": "south", "south": "north", "east": "west", "west": "east"}
_QUESTIONS = 5  # of a published story; each of them, with the facts before it, is one sample
_LISTEN_FACTS = 3  # at least, before the next question
_TRIES = 20  # stories that turn out too long, before they end after their first question
ChoiceT = TypeVar("ChoiceT")


class Round(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Story(NamedTuple):
    """What happens, and what can be asked at the end."""

    task: BabiTask
    facts: tuple[str, ...]  # sentences, in order
    rounds: tuple[Round, ...]  # the first is the one to ask; the others are about the same facts, in random order


def draw_story(random: np.random.Generator, task: BabiTask, max_facts: int) -> Story:
    """A random story, which ends like a published one at the first to fifth of its questions.

    Args:
        random: determines the story.
        task: what happens and is asked.
        max_facts: at least `LEAST_FACTS`; longer stories are drawn again.
    """
    assert max_facts >= LEAST_FACTS
    if task == "qa4":
        return _draw_map(random)
    tries = 0
    while True:
        questions = int(random.integers(1, _QUESTIONS + 1)) if tries < _TRIES else 1
        world = _World(random, task)
        if world.play(questions, max_facts):
            first, *others = world.ask()
            order = random.permutation(len(others)).tolist()
            return Story(task, tuple(world.facts), (first, *(others[i] for i in order)))
        tries += 1


def _draw_map(random: np.random.Generator) -> Story:
    """Three places in a row, from west to east or from south to north, and the middle one's two neighbours."""
    low, middle, high = (PLACES[i] for i in random.permutation(len(PLACES))[:3])
    up = ("north", "east")[random.integers(2)]
    down = _OPPOSITES[up]
    facts, rounds = [], []
    for neighbour, direction in ((high, up), (low, down)):
        near, far = (neighbour, middle) if random.random() < 0.5 else (middle, neighbour)
        facts.append(f"The {near} is {direction if near == neighbour else _OPPOSITES[direction]} of the {far}.")
        rounds += [
            Round(f"What is {direction} of the {middle}?", neighbour),
            Round(f"What is the {middle} {_OPPOSITES[direction]} of?", neighbour),
        ]
    order = random.permutation(2)
    shuffled = tuple(rounds[i] for i in random.permutation(4))
    return Story("qa4", tuple(facts[i] for i in order), shuffled)


class _Gift(NamedTuple):
    giver: str
    thing: str
    receiver: str


class _World:
    """Who is where and holds what, and the facts about it.

    Args:
        random: determines all that happens.
        task: which actions there are.
    """

    def __init__(self, random: np.random.Generator, task: BabiTask) -> None:
        self._random, self._task = random, task
        self._people = GIVERS if task == "qa5" else PEOPLE
        self._places = {person: self._choose(PLACES) for person in self._people}
        self._mentioned: dict[str, None] = {}  # people whose place is known
        self._holders: dict[str, str] = {}  # of the objects that somebody has
        self._lying = {thing: self._choose(PLACES) for thing in OBJECTS}  # of the others: where they are
        self._histories: dict[str, list[str]] = {thing: [] for thing in OBJECTS}  # places, once somebody had it
        self._gifts: list[_Gift] = []
        self.facts: list[str] = []

    def play(self, questions: int, max_facts: int) -> bool:
        """Lets things happen until the time of the last question has come; false if it would take more facts."""
        act: Callable[[], None] = self._move if self._task == "qa1" else self._act
        since = 0
        while questions:
            if len(self.facts) == max_facts:
                return False
            gifts = len(self._gifts)
            act()
            since += 1
            if self._task == "qa1":
                asked = since == 2
            elif self._task == "qa5":
                asked = since >= _LISTEN_FACTS and len(self._gifts) > gifts
            else:
                known = any(len(past) >= (2 if self._task == "qa3" else 1) for past in self._histories.values())
                asked = since >= _LISTEN_FACTS and known and self._random.random() < 0.5
            if asked:
                questions, since = questions - 1, 0
        if self._task == "qa5":  # something else may happen after the last gift
            for _ in range(min(int(self._random.integers(0, 4)), max_facts - len(self.facts))):
                self._move()
        return True

    def ask(self) -> list[Round]:
        """All questions that have an answer; the first is the one to ask."""
        if self._task == "qa1":
            found = [Round(f"Where is {person}?", self._places[person]) for person in self._mentioned]
        elif self._task == "qa2":
            found = [Round(f"Where is the {thing}?", past[-1]) for thing, past in self._histories.items() if past]
        elif self._task == "qa3":
            return self._ask_before()
        else:
            return self._ask_gifts()
        return [found[i] for i in self._random.permutation(len(found))]

    def _ask_before(self) -> list[Round]:
        """About objects that were in two places; the first question is about the last move of one of them."""
        moved = [thing for thing, past in self._histories.items() if len(past) > 1]
        latest: list[Round] = []
        earlier: list[Round] = []
        for thing in moved:
            past, seen = self._histories[thing], set[str]()
            for place, before in zip(past[:0:-1], past[-2::-1], strict=True):
                if place not in seen:
                    (earlier if seen else latest).append(Round(f"Where was the {thing} before the {place}?", before))
                seen.add(place)
        return [latest[i] for i in self._random.permutation(len(latest))] + earlier

    def _ask_gifts(self) -> list[Round]:
        """About the latest of the gifts that fit a question; all questions are equally likely to be the first."""
        rounds: dict[str, str] = {}
        for giver, thing, receiver in self._gifts:  # later answers to a question replace earlier ones
            rounds[f"What did {giver} give to {receiver}?"] = thing
            rounds[f"Who did {giver} give the {thing} to?"] = receiver
            rounds[f"Who gave the {thing} to {receiver}?"] = giver
            rounds[f"Who gave the {thing}?"] = giver
            rounds[f"Who received the {thing}?"] = receiver
        questions = list(rounds)
        return [Round(questions[i], rounds[questions[i]]) for i in self._random.permutation(len(questions))]

    def _choose(self, choices: Sequence[ChoiceT]) -> ChoiceT:
        return choices[int(self._random.integers(len(choices)))]

    def _act(self) -> None:
        """A move with probability 1/3; otherwise something with an object, if anybody can do anything."""
        hands = [] if self._random.random() < 1 / 3 else self._find_handlings()
        if hands:
            self._choose(hands)()
        else:
            self._move()

    def _find_handlings(self) -> list[Callable[[], None]]:
        """What can be done with objects now; in qa5 taking and giving are equally likely, so all of one of them."""
        able = self._people if self._task == "qa5" else tuple(self._mentioned)
        takes: list[Callable[[], None]] = [
            partial(self._take, person, thing)
            for thing, place in self._lying.items()
            for person in able
            if self._places[person] == place
        ]
        held = [(thing, person) for thing, person in self._holders.items()]
        if self._task != "qa5":
            return takes + [partial(self._drop, person, thing) for thing, person in held]
        gives: list[Callable[[], None]] = [
            partial(self._give, _Gift(person, thing, other))
            for thing, person in held
            for other in self._people
            if other != person and self._places[other] == self._places[person]
        ]
        return gives if gives and (not takes or self._random.random() < 0.5) else takes

    def _move(self) -> None:
        person = self._choose(self._people)
        place = self._choose([place for place in PLACES if place != self._places[person]])
        self._places[person] = place
        self._mentioned[person] = None
        self.facts.append(f"{person} {self._choose(_MOVES)} to the {place}.")
        for thing, holder in self._holders.items():
            if holder == person:
                self._histories[thing].append(place)

    def _take(self, person: str, thing: str) -> None:
        place = self._lying.pop(thing)
        self._holders[thing] = person
        if not self._histories[thing]:
            self._histories[thing].append(place)
        self.facts.append(f"{person} {self._choose(_TAKES)} the {thing}{self._choose(('', ' there'))}.")

    def _drop(self, person: str, thing: str) -> None:
        del self._holders[thing]
        self._lying[thing] = self._places[person]
        self.facts.append(f"{person} {self._choose(_DROPS)} the {thing}{self._choose(('', ' there'))}.")

    def _give(self, gift: _Gift) -> None:
        self._holders[gift.thing] = gift.receiver
        self._gifts.append(gift)
        self.facts.append(f"{gift.giver} {self._choose(_GIVES)} the {gift.thing} to {gift.receiver}.")
