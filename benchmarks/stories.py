"""Makes stories with summaries: eight facts, each in one sentence somewhere in any amount of other talk.

    python benchmarks/stories.py --out runs/stories --count 12000 --words 60 700
    python benchmarks/stories.py --out runs/stories --count 40 --words 8000 --name test-8000 --seed 1

The summary states the facts, which can't be guessed: each is one of sixteen, and the talk around them names the same
persons, places and things. Whoever has not read, and kept, the eight sentences gets the words between the facts right
and nothing else. Files are JSON lines with `book` and `summary`; the same seed gives the same stories.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PERSONS = [
    "Marta",
    "Otto",
    "Selma",
    "Jonas",
    "Frida",
    "Anton",
    "Greta",
    "Emil",
    "Clara",
    "Bruno",
    "Lotte",
    "Felix",
    "Hanna",
    "Oskar",
    "Paula",
    "Viktor",
]
PLACES = [
    "Lindau",
    "Trent",
    "Basel",
    "Ghent",
    "Krakow",
    "Porto",
    "Turku",
    "Malmo",
    "Siena",
    "Vilnius",
    "Bergen",
    "Leiden",
    "Cadiz",
    "Gotha",
    "Ulm",
    "Zadar",
]
TRADES = "baker tailor miller smith painter sailor hunter weaver potter doctor singer farmer barber mason clerk guard"
THINGS = "crown lantern mirror compass violin letter sword ring kettle map bell clock mask key drum scarf"
BEASTS = "horse dog donkey goat cat crow fox bear mule goose hare wolf swan calf hen owl"
SEASONS = "spring summer autumn winter January February March April May June July August harvest Easter Advent Lent"
COLOURS = "silver golden copper wooden glass iron ivory marble velvet leather bronze paper stone amber pearl tin"
FACTS = {  # the words to choose from, and the sentences that state one of them
    "hero": (PERSONS, ["This is the story of {}.", "We follow the story of {}."]),
    "trade": (TRADES.split(), ["By trade our hero was a {}.", "Our hero worked as a {}."]),
    "home": (PLACES, ["The home of our hero was {}.", "Our hero was born in {}."]),
    "season": (SEASONS.split(), ["The journey began in {}.", "The time of the journey was {}."]),
    "friend": (PERSONS, ["A true companion was {}.", "On the way came a companion, {}."]),
    "beast": (BEASTS.split(), ["All the baggage was carried by a {}.", "For the baggage there was a {}."]),
    "colour": (COLOURS.split(), ["What they sought was {}.", "They said that it was {}."]),
    "thing": (THINGS.split(), ["They sought a lost {}.", "The road should lead to a lost {}."]),
}
SUMMARY = (
    "{hero}, a {trade} of {home}, set out in {season} with {friend} and a {beast} and found the lost {colour} {thing}."
)
PEOPLE = ["an old man", "the mayor", "a child", "two soldiers", "the neighbour", "a stranger", "the priest"]
TALK = [
    "{person} saw {people} near the market.",
    "{people} spoke of {place} all evening.",
    "Nobody in {place} had heard of {person}.",
    "There was a {beast} behind the house.",
    "{people} bought a {thing} and went away.",
    "The {trade} shut the door and slept.",
    "In {season} the river is cold.",
    "{person} wrote to {person2} about the rain.",
    "A {colour} {thing} hung on the wall.",
    "The road to {place} was long and dusty.",
    "{people} asked for bread and salt.",
    "The {trade} and the {trade2} played cards.",
    "It rained, and the wind came from the sea.",
    "{people} laughed and said nothing more.",
]


def draw_talk(random: np.random.Generator) -> str:
    """A sentence that matters to nobody."""

    def one(words: list[str]) -> str:
        return words[random.integers(len(words))]

    sentence = one(TALK).format(
        person=one(PERSONS),
        person2=one(PERSONS),
        people=one(PEOPLE),
        place=one(PLACES),
        beast=one(BEASTS.split()),
        thing=one(THINGS.split()),
        trade=one(TRADES.split()),
        trade2=one(TRADES.split()),
        season=one(SEASONS.split()),
        colour=one(COLOURS.split()),
    )
    return sentence[0].upper() + sentence[1:]


def draw_story(random: np.random.Generator, words: int) -> dict[str, str]:
    """A story of about `words` words, at least its eight facts, in any order and at any place."""
    chosen = {name: str(random.choice(values)) for name, (values, _) in FACTS.items()}
    while chosen["friend"] == chosen["hero"]:
        chosen["friend"] = str(random.choice(PERSONS))
    facts = [str(random.choice(said)).format(chosen[name]) for name, (_, said) in FACTS.items()]
    talk, count = [], sum(len(fact.split()) for fact in facts)
    while count < words:
        talk.append(draw_talk(random))
        count += len(talk[-1].split())
    places = np.sort(random.integers(0, len(talk) + 1, len(facts)))
    for place, number in sorted(zip(places.tolist(), random.permutation(len(facts)).tolist(), strict=True))[::-1]:
        talk.insert(place, facts[number])
    return {"book": " ".join(talk), "summary": SUMMARY.format(**chosen)}


def draw_stories(seed: int, count: int, least: int, most: int) -> Iterator[dict[str, str]]:
    """Stories of lengths that are even on a logarithmic scale."""
    for number in range(count):
        random = np.random.default_rng([seed, number])
        words = int(math.exp(random.uniform(math.log(least), math.log(most))))
        yield {"id": f"story-{seed}-{number}", **draw_story(random, words)}


def main() -> None:
    """Writes the files asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="stories")
    parser.add_argument("--name", default="train", help="of the file (default: train)")
    parser.add_argument("--words", type=int, nargs="+", required=True, metavar="N", help="of a story; two: from, to")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other stories (default: 0)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    stories = draw_stories(options.seed, options.count, options.words[0], options.words[-1])
    with (options.out / f"{options.name}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(story) + "\n" for story in stories)


if __name__ == "__main__":
    main()
