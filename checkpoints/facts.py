"""Documents of facts, and questions that need them: the data that the bundled model was trained on and is tried on.

A document names people, where they live, how old they are and who their friend is, between sentences that no question
asks about. A question needs one fact (lookup), two of one kind (comparison) or one found through another (two_hop).
Every document follows from (seed, index) alone.
"""

import argparse
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

NAMES = [
    "Anna",
    "Boris",
    "Carla",
    "David",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Lukas",
    "Maria",
    "Nils",
    "Olga",
    "Peter",
    "Rosa",
    "Simon",
    "Tanja",
    "Urban",
    "Vera",
    "Walter",
    "Xenia",
    "Yusuf",
    "Zora",
    "Adam",
    "Berta",
    "Cyril",
    "Dora",
    "Emil",
    "Flora",
    "Georg",
    "Hanna",
    "Ivan",
    "Julia",
    "Kurt",
    "Laura",
    "Max",
    "Nora",
    "Otto",
]
CITIES = [
    "Oslo",
    "Lima",
    "Cairo",
    "Paris",
    "Rome",
    "Delhi",
    "Tokyo",
    "Quito",
    "Sofia",
    "Bern",
    "Minsk",
    "Accra",
    "Hanoi",
    "Seoul",
    "Riga",
    "Doha",
    "Perth",
    "Lyon",
    "Porto",
    "Turin",
    "Basel",
    "Ghent",
    "Leeds",
    "Malmo",
    "Nantes",
    "Osaka",
    "Pisa",
    "Reims",
    "Siena",
    "Tampa",
    "Utrecht",
    "Verona",
    "Zagreb",
    "York",
    "Bergen",
    "Cadiz",
    "Dakar",
    "Essen",
]
COUNTRIES = [
    "Norland",
    "Sudland",
    "Estmark",
    "Westmark",
    "Highmoor",
    "Lowmoor",
    "Sandria",
    "Icemark",
    "Greenland",
    "Rockland",
]
AGES = [str(age) for age in range(10, 70)]
THINGS = ["market", "river", "garden", "museum", "bridge", "station", "library", "harbour", "square", "theatre"]
MOODS = ["quiet", "busy", "empty", "bright", "cold", "noisy", "closed", "pretty"]
WORDS = [
    "lives",
    "in",
    "is",
    "The",
    "friend",
    "of",
    "Where",
    "does",
    "live",
    "Who",
    "older",
    "or",
    "How",
    "old",
    "the",
    "Question",
    "Answer",
    "was",
    "that",
    "day",
    ".",
    ",",
    ":",
    "?",
]
KINDS = ("lookup", "comparison", "two_hop")


@dataclass(frozen=True)
class Person:
    name: str
    city: str
    country: str
    age: str
    friend: str


def vocabulary() -> list[str]:
    """Every word that documents, questions and answers use."""
    return [*dict.fromkeys([*NAMES, *CITIES, *COUNTRIES, *AGES, *THINGS, *MOODS, *WORDS])]


def document(rng: random.Random, people: int = 10, distractors: int = 6) -> tuple[str, list[Person]]:
    """A shuffled document about ``people`` people, and the people. No two of them share a city or an age."""
    names, cities, ages = rng.sample(NAMES, people), rng.sample(CITIES, people), rng.sample(AGES, people)
    persons = []
    for index, name in enumerate(names):
        friend = rng.choice([other for other in names if other != name])
        persons.append(Person(name, cities[index], rng.choice(COUNTRIES), ages[index], friend))
    sentences = []
    for person in persons:
        sentences.append(f"{person.name} lives in {person.city} , {person.country} .")
        sentences.append(f"{person.name} is {person.age} .")
        sentences.append(f"The friend of {person.name} is {person.friend} .")
    for _ in range(distractors):
        thing, city, mood = rng.choice(THINGS), rng.choice(CITIES), rng.choice(MOODS)
        sentences.append(f"The {thing} in {city} was {mood} that day .")
    rng.shuffle(sentences)
    return " ".join(sentences), persons


def question(rng: random.Random, persons: list[Person], kind: str) -> tuple[str, str]:
    """A question about the people and its answer."""
    by_name = {person.name: person for person in persons}
    person = rng.choice(persons)
    friend = by_name[person.friend]
    if kind == "lookup":
        text, answer = rng.choice(
            [
                (f"Where does {person.name} live ?", f"{person.city} , {person.country}"),
                (f"How old is {person.name} ?", person.age),
                (f"Who is the friend of {person.name} ?", person.friend),
            ]
        )
    elif kind == "comparison":
        other = rng.choice([each for each in persons if each != person])
        text = f"Who is older , {person.name} or {other.name} ?"
        answer = max(person, other, key=lambda each: int(each.age)).name
    else:
        text, answer = rng.choice(
            [
                (f"Where does the friend of {person.name} live ?", f"{friend.city} , {friend.country}"),
                (f"How old is the friend of {person.name} ?", friend.age),
            ]
        )
    return f"Question : {text} Answer :", answer


def row(seed: int, index: int) -> dict[str, str]:
    """Example ``index`` of ``seed``: ``{"prompt", "response", "kind"}``."""
    rng = random.Random(f"{seed}/{index}")
    kind = KINDS[index % len(KINDS)]
    text, persons = document(rng, people=rng.randint(9, 11), distractors=rng.randint(4, 10))
    asked, answer = question(rng, persons, kind)
    return {"prompt": f"{text} {asked}", "response": answer, "kind": kind}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    temporary = arguments.output.with_name(arguments.output.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for index in range(arguments.rows):
            file.write(json.dumps(row(arguments.seed, index)) + "\n")
    os.replace(temporary, arguments.output)


if __name__ == "__main__":
    main()
