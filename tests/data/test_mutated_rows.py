"""Files of rows with random mutations: they are read, or refused with one line."""

import json
import random

import pytest

from pop_lightning.core.errors import InputError

from tests.data.test_data import CHAT, load, make_tokenizer, words

SEED = 0
ROWS = [
    {"prompt": words(1, 2, 3), "response": words(4)},
    {"prompt": words(5, 6), "completion": words(7)},
    {"prompt": words(8, 9)},
    {"text": words(*range(40))},
    {"messages": [{"role": "user", "content": words(1)}, {"role": "assistant", "content": words(2)}]},
    {"messages": [{"role": "user", "content": words(3)}], "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}},
    {"prompt": words(10, 11), "response": words(12), "images": ["x.png"]},
]
PIECES = (
    *("null", "true", "-1", "1e400", "NaN", "[]", "{}", "'", '"', ":", ",", "[", "{", "\\", "\\u0000", "\t", "\x00"),
    *("\\ud800", "9" * 5000, "[" * 2000, '{"a":' * 2000, '"prompt": ', '"messages": ', '"role"', '"videos": [', "é"),
    *('"response": null', "\ufeff", "\r", "\u2028"),
)


def mutated(text, rng):
    """``text`` with a piece put in, a stretch taken out, or two stretches exchanged, once to four times."""
    for _ in range(rng.randint(1, 4)):
        at, other = sorted(rng.randrange(len(text) or 1) for _ in range(2))
        how = rng.randrange(3)
        if how == 0:
            text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(6) :]
        elif how == 1:
            text = text[:at] + text[at + rng.randrange(60) :]
        else:
            text = (
                text[:at] + text[other : other + 20] + text[at + 20 : other] + text[at : at + 20] + text[other + 20 :]
            )
    return text


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.full)])
def test_mutated_rows_are_rows_or_one_sentence(tmp_path, count):
    """150 files in the quick suite, 5,000 in the long one."""
    rng, tokenizer, outcomes = random.Random(SEED), make_tokenizer(chat=CHAT), {True: 0, False: 0}
    for number in range(count):
        rows = rng.choices(ROWS, k=rng.randint(4, 24))
        array = rng.random() < 0.3
        text = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
        path = tmp_path / f"rows{number % 2}.{'json' if array else 'jsonl'}"
        path.write_bytes(mutated(text, rng).encode("utf-8", "surrogatepass"))
        try:
            said = str(load(path, tokenizer).report)
        except InputError as error:
            said, refused = str(error), True
        else:
            refused = False
        outcomes[refused] += 1
        assert "\n" not in said, (number, said)
        assert len(said) < 2000, number
    assert min(outcomes.values()) > count / 50, outcomes
