"""Data for the bundled model: short documents of facts, each with one question about them.

This is the first step of the flow: `train.py` trains the bundled Gemma-3 model on these documents, and
`calibration.jsonl` next to the checkpoint (what `pop-fit` reads) is this module's own output. Every document states
where some people live, how old they are and who their friend is, between sentences that answer nothing. The question
is of one of three kinds: `lookup` (one fact), `comparison` (two ages) or `two_hop` (the friend, then where the friend
lives; the answer names both, "Boris in Oslo"). Everything is a pure function of a seed and an index.
"""

import argparse
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

KINDS = ("lookup", "comparison", "two_hop")
NAMES = tuple(
    "Anna Boris Carla David Elena Felix Greta Hugo Irene Jonas Karin Lukas Maria Nils Olga Peter Rosa Simon Tanja "  # noqa: SIM905
    "Urban Vera Walter Xenia Yusuf Zora Adam Berta Cyril Dora Emil Flora Georg".split()
)
CITIES = tuple(
    "Oslo Lima Cairo Paris Rome Delhi Tokyo Quito Sofia Bern Minsk Accra Hanoi Seoul Riga Doha Perth Lyon Porto "  # noqa: SIM905
    "Turin Basel Ghent Leeds Malmo".split()
)
AGES = tuple(str(age) for age in range(20, 60))
THINGS = ("market", "river", "garden", "museum", "bridge", "station", "library", "harbour", "square", "theatre")
MOODS = ("quiet", "busy", "empty", "bright", "cold", "noisy", "closed", "pretty")
OTHER = tuple(
    "lives in is The friend of Where does live Who older or How old the Question Answer was that day . , : ?".split()  # noqa: SIM905
)
MIN_AGE_GAP = 3  # years between two people whose ages are compared


@dataclass(frozen=True)
class Person:
    name: str
    city: str
    age: str
    friend: str


def vocabulary() -> list[str]:
    """Every word that documents, questions and answers use."""
    return [*dict.fromkeys([*NAMES, *CITIES, *AGES, *THINGS, *MOODS, *OTHER])]


def document(rng: random.Random, people: int = 8, distractors: int = 10) -> tuple[str, list[Person]]:
    """A shuffled document about ``people`` people, and the people. No two of them share a city or an age."""
    names, cities, ages = rng.sample(NAMES, people), rng.sample(CITIES, people), rng.sample(AGES, people)
    persons = []
    for name, city, age in zip(names, cities, ages, strict=True):
        persons.append(Person(name, city, age, rng.choice([other for other in names if other != name])))
    sentences = []
    for person in persons:
        sentences.append(f"{person.name} lives in {person.city} .")
        sentences.append(f"{person.name} is {person.age} .")
        sentences.append(f"The friend of {person.name} is {person.friend} .")
    for _ in range(distractors):
        thing, city, mood = rng.choice(THINGS), rng.choice(CITIES), rng.choice(MOODS)
        sentences.append(f"The {thing} in {city} was {mood} that day .")
    rng.shuffle(sentences)
    return " ".join(sentences), persons


def question(rng: random.Random, persons: list[Person], kind: str) -> tuple[str, str]:
    """A question about the people and its answer; ages closer than MIN_AGE_GAP are not compared."""
    by_name = {person.name: person for person in persons}
    person = rng.choice(persons)
    others = [each for each in persons if abs(int(each.age) - int(person.age)) >= MIN_AGE_GAP]
    if kind == "two_hop":
        friend = by_name[person.friend]
        text, answer = f"Where does the friend of {person.name} live ?", f"{friend.name} in {friend.city}"
    elif kind == "comparison" and others:
        other = rng.choice(others)
        text = f"Who is older , {person.name} or {other.name} ?"
        answer = max(person, other, key=lambda each: int(each.age)).name
    else:  # few people of nearly one age have nothing to compare: ask for a fact instead
        text, answer = rng.choice(
            [
                (f"Where does {person.name} live ?", person.city),
                (f"How old is {person.name} ?", person.age),
                (f"Who is the friend of {person.name} ?", person.friend),
            ]
        )
    return f"Question : {text} Answer :", answer


def row(seed: int, index: int) -> dict[str, str]:
    """Row ``index`` of the data set ``seed``: a document of 200 to 250 words with a question, its answer, its kind."""
    rng = random.Random(f"{seed}/{index}")
    kind = KINDS[index % len(KINDS)]
    text, persons = document(rng, distractors=rng.randint(8, 12))
    asked, answer = question(rng, persons, kind)
    return {"prompt": f"{text} {asked}", "response": f" {answer}", "kind": kind}


def write(path: Path, rows: int, seed: int) -> None:
    """Write the first ``rows`` rows of data set ``seed`` as JSON lines; the file appears when it is complete."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        for index in range(rows):
            file.write(json.dumps(row(seed, index)) + "\n")
    os.replace(draft, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write facts documents with one question each as JSON lines.")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    write(options.output, options.rows, options.seed)


if __name__ == "__main__":
    main()
