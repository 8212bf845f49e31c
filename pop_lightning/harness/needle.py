"""Retrieval from long prompts, by RULER's definitions (Hsieh et al., arXiv 2404.06654), for any tokenizer and offline.

Three tasks for lm-eval, each at every length, and a heat map of length against where the needle is:

- ``needle_single``: one key and its number in repeated noise, with the needle at a given position.
- ``needle_several``: four keys with a number each, at random positions, all four of which are asked for.
- ``needle_hops``: variable tracking, a chain of four assignments at random positions; all five variables are asked for.

The texts are RULER's. What differs: keys come from a short list, ``needle_hops`` has no worked example before it (it
would need 500 tokens), and answers have fewer tokens, so that short lengths are possible.
"""

import random
import string
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from pop_lightning.core.errors import InputError
from pop_lightning.core.files import write_whole
from pop_lightning.core.plots import picture
from pop_lightning.core.tables import Table

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
ASK_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {query} mentioned in the provided text?"
)
ASK_SEVERAL = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} mentioned in the provided "
    "text?"
)
ASK_CHAIN = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above."
)
ADJECTIVES = ("brave", "calm", "eager", "fancy", "gentle", "happy", "jolly", "kind", "lively", "nice")
NOUNS = ("apple", "bridge", "camera", "desert", "engine", "forest", "guitar", "hammer", "island", "kettle")
# Tokens that an answer may have; the prompt gets the rest of the length.
ANSWER = {"needle_single": 32, "needle_several": 96, "needle_hops": 64}
TASKS = tuple(ANSWER)
POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
NOTE = "Share of the requested answers, full then pruned, by prompt length in tokens."
PER_CELL = 10  # documents at each length, and for needle_single at each position
SEVERAL, HOPS = 4, 4
SEED = 42


def task(name: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> dict[str, Any]:
    """lm-eval's configuration of one of :data:`TASKS`; its documents are made when lm-eval loads it."""

    def dataset(**_) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(documents(name, tokenizer, lengths))}

    return {
        "task": name,
        "custom_dataset": dataset,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "gen_prefix": "{{gen_prefix}}",
        "target_delimiter": " ",
        "process_results": lambda doc, results: {"string_match": string_match(results[0], doc["outputs"])},
        "metric_list": [{"metric": "string_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"do_sample": False, "max_gen_toks": ANSWER[name], "until": []},
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def string_match(answer: str, outputs: Sequence[str]) -> float:
    """RULER's score: the share of ``outputs`` that occur in the answer, in any case."""
    return sum(output.lower() in answer.lower() for output in outputs) / len(outputs)


def check_limit(names: Sequence[str], lengths: Sequence[int], limit: int | None) -> None:
    """Refuse a limit that would leave cells of a task without a document, and so drop lengths from the grid.

    Raises:
        InputError: with the least limit that every cell has a document with.
    """
    for name in filter(TASKS.__contains__, names):
        positions, sizes = len(_positions(name)), len(set(lengths))
        if limit is not None and limit < positions * sizes:
            cells = f"{sizes} {'length' if sizes == 1 else 'lengths'}" + (f" x {positions} positions" * (positions > 1))
            raise InputError(
                f"--limit {limit} leaves cells of {name} without a document: expected at least {positions * sizes} "
                f"({cells}); raise --limit, or give fewer --lengths."
            )


def _positions(name: str) -> tuple[float | None, ...]:
    return POSITIONS if name == "needle_single" else (None,)


def documents(name: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """:data:`PER_CELL` documents per length and position, each as long as fits; the first of every cell come first.

    Each has ``input``, ``gen_prefix``, ``outputs``, ``length``, ``position`` (None where needles are spread) and
    ``tokens``, those of the prompt.

    Raises:
        InputError: a length in which not even the question fits.
    """
    positions = _positions(name)

    def make(length: int, position: float | None, index: int, noise: int) -> dict[str, Any]:
        rng = random.Random(f"{SEED} {name} {length} {position} {index}")
        document = _chain(rng, noise) if name == "needle_hops" else _needles(rng, noise, position)
        text = f"{document['input']} {document['gen_prefix']}"
        return document | {"length": length, "position": position, "tokens": len(tokenizer(text).input_ids)}

    def fits(length: int, noise: int) -> bool:
        return make(length, positions[0], 0, noise)["tokens"] + ANSWER[name] <= length

    least = 1 if name == "needle_single" else HOPS + 1
    most = {}
    for length in lengths:
        if not fits(length, least):
            needed = make(length, positions[0], 0, least)["tokens"] + ANSWER[name]
            raise InputError(f"--lengths {length} is too short for {name}: this tokenizer needs at least {needed}.")
        low, high = least, 2 * least
        while fits(length, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(length, middle) else (low, middle)
        most[length] = low
    made = []
    for index in range(PER_CELL):
        for length in lengths:
            for position in positions:
                noise = most[length]
                document = make(length, position, index, noise)
                while document["tokens"] + ANSWER[name] > length and noise > least:  # other keys, more tokens
                    noise -= 1
                    document = make(length, position, index, noise)
                made.append(document)
    return made


def _needles(rng: random.Random, noise: int, position: float | None) -> dict[str, Any]:
    """``noise`` sentences with one needle at ``position``, or with several at random ones."""
    count = SEVERAL if position is None else 1
    keys = rng.sample([f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS], count)
    values = [str(rng.randint(10**6, 10**7 - 1)) for _ in keys]
    sentences = [NOISE] * noise
    places = sorted(
        rng.sample(range(noise + 1), count) if position is None else [round(position * noise)], reverse=True
    )
    for place, key, value in zip(places, keys, values, strict=True):
        sentences.insert(place, NEEDLE.format(key=key, value=value))
    query = keys[0] if count == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    number, verb = ("number", "is") if count == 1 else ("numbers", "are")
    return {
        "input": (ASK_ONE if count == 1 else ASK_SEVERAL).format(context="\n".join(sentences), query=query),
        "gen_prefix": f"The special magic {number} for {query} mentioned in the provided text {verb}",
        "outputs": values,
    }


def _chain(rng: random.Random, noise: int) -> dict[str, Any]:
    """``noise`` sentences with a chain of assignments, in order, at random positions."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(rng.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    sentences = [f"{NOISE}\n"] * noise
    for moved, place in enumerate(sorted(rng.sample(range(noise), len(chain)))):
        sentences.insert(place + moved, f"{chain[moved]}\n")
    return {
        "input": ASK_CHAIN.format(context=" ".join(sentences), query=value),
        "gen_prefix": f"Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} "
        f"variables are assigned the value {value}, they are:",
        "outputs": names,
    }


def cells(results: dict[str, dict]) -> list[dict[str, Any]]:
    """The mean score of both models in each cell: task, position and length."""
    scores: dict[tuple, dict[str, list[float]]] = {}
    for variant, result in results.items():
        for name in filter(result["samples"].__contains__, TASKS):
            for sample in result["samples"][name]:
                cell = (name, sample["doc"]["position"], sample["doc"]["length"])
                scores.setdefault(cell, {}).setdefault(variant, []).append(sample["string_match"])
    return [
        {"task": name, "position": position, "length": length, "documents": len(each["full"])}
        | {variant: float(np.mean(values)) for variant, values in each.items()}
        for (name, position, length), each in scores.items()
    ]


def _grid(found: Sequence[dict[str, Any]]) -> tuple[list[str], list[int], dict[str, np.ndarray]]:
    """Rows (task, with its position), columns (lengths) and both models' scores, ``[rows, columns]``."""
    rows = list(dict.fromkeys((cell["task"], cell["position"]) for cell in found))
    lengths = sorted({cell["length"] for cell in found})
    values = {variant: np.full((len(rows), len(lengths)), np.nan) for variant in ("full", "pruned")}
    for cell in found:
        at = rows.index((cell["task"], cell["position"])), lengths.index(cell["length"])
        for variant, grid in values.items():
            grid[at] = cell[variant]
    labels = [name if position is None else f"{name} at {position:.0%}" for name, position in rows]
    return labels, lengths, values


def grid_table(found: Sequence[dict[str, Any]]) -> Table:
    """One line per task and position, one column per length: full, then pruned."""
    labels, lengths, values = _grid(found)
    rows = [
        [label, *(f"{full:.2f} {pruned:.2f}" for full, pruned in zip(*pair, strict=True))]
        for label, *pair in zip(labels, values["full"], values["pruned"], strict=True)
    ]
    return Table(["needle", *map(str, lengths)], rows)


def write_heat_map(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Full and pruned side by side, on one color scale from 0 to 1, with every value written in its cell."""
    labels, lengths, values = _grid(found)
    drawing = Figure(figsize=(3.4 + 1.3 * len(lengths), 1.4 + 0.4 * len(labels)), layout="constrained")
    for axes, (variant, grid) in zip(drawing.subplots(1, 2, sharey=True), values.items(), strict=True):
        _draw(axes, grid, labels, lengths)
        axes.set_title(variant)
    write_whole(path, lambda temporary: drawing.savefig(temporary, dpi=150))


def pictures(found: Sequence[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """The heat maps for a page: which model, and its picture."""
    labels, lengths, values = _grid(found)
    size = (2.6 + 0.8 * len(lengths), 1.0 + 0.4 * len(labels))
    return [
        (variant, picture(lambda axes, _, grid=grid: _draw(axes, grid, labels, lengths), f"Scores, {variant}", size))
        for variant, grid in values.items()
    ]


def _draw(axes: Axes, grid: np.ndarray, labels: list[str], lengths: list[int]) -> None:
    axes.grid(False)
    axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("tokens")
