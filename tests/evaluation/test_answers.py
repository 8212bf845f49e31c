"""Measures of answers against a plain reference in a few lines each, and against the packages that define them."""

import random
import re
import string
from functools import lru_cache

import pytest
from scipy import stats

from pop_lightning.evaluation.answers import common_prefix, exact_match, rouge_l, token_f1
from pop_lightning.evaluation.paired import paired_interval, sameness_interval

WORDS = ["The", "a", "cat", "Cat's", "sat", "on", "12", "3.5", "mat", "U.S.", "snow-white", ",", "!", "", "_x_"]


def texts(count, seed=0, most=9):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(most))) for _ in range(count)]


PAIRS = [*zip(texts(200), texts(200, seed=1), strict=True), ("", ""), ("the", "a"), ("", "cat"), ("cat", "!")]


def plain_f1(answer, reference):
    def words(text):
        text = "".join(each for each in text.lower() if each not in string.punctuation)
        return [word for word in text.split() if word not in ("a", "an", "the")]

    found, wanted = words(answer), words(reference)
    if not found or not wanted:
        return 1.0 if found == wanted else 0.0
    same = sum(min(found.count(word), wanted.count(word)) for word in set(found))
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall) if same else 0.0


def plain_rouge_l(answer, reference):
    a, b = (re.sub("[^a-z0-9]+", " ", text.lower()).split() for text in (answer, reference))

    @lru_cache(None)
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return 0.0 if not longest(0, 0) else 2 * longest(0, 0) / (len(a) + len(b))


@pytest.mark.parametrize(("measure", "plain"), [(token_f1, plain_f1), (rouge_l, plain_rouge_l)])
def test_measures_are_those_of_a_plain_loop(measure, plain):
    values = [measure(*pair) for pair in PAIRS]
    assert values == pytest.approx([plain(*pair) for pair in PAIRS])
    assert len(set(values)) > 10


def test_rouge_l_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    for answer, reference in PAIRS:
        assert rouge_l(answer, reference) == pytest.approx(scorer.score(reference, answer)["rougeL"].fmeasure)


def test_long_answers_are_compared_in_time():
    rng = random.Random(0)
    first, second = ([rng.choice("abcdefgh") for _ in range(3000)] for _ in range(2))
    assert 0.5 < rouge_l(" ".join(first), " ".join(second)) < 1


def test_scripts_without_spaces_are_compared_by_character():
    assert token_f1("東京都", "東京") == pytest.approx(0.8)
    assert rouge_l("東京都", "東京") == pytest.approx(0.8)
    assert rouge_l("größe", "größe") == 1.0


def test_exact_match_is_of_the_text_as_it_is():
    assert exact_match(" a b\n", "a b") == 1.0
    assert exact_match("A b", "a b") == 0.0


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [([], [], 1.0), ([1], [], 0.0), ([1, 2], [1, 2], 1.0), ([1, 2, 3, 4], [1, 2, 9], 0.5), ([1], [1, 2, 3, 4], 0.25)],
)
def test_the_common_prefix_is_a_share_of_the_longer_answer(first, second, share):
    assert common_prefix(first, second) == common_prefix(second, first) == share


def test_the_interval_of_a_share_is_exact_and_of_other_rates_cut_at_what_is_possible():
    found = sameness_interval([1.0] * 18 + [0.0] * 2)
    assert found.difference == pytest.approx(-0.1)
    assert (1 + found.low, 1 + found.high) == pytest.approx(
        (stats.beta.ppf(0.025, 18, 3), stats.beta.ppf(0.975, 19, 2)), abs=1e-9
    )
    assert sameness_interval([1.0] * 9).high == 0
    assert sameness_interval([1.0] * 9).low < -0.2
    found = sameness_interval([0.99, 1.0, 0.2])
    assert (found.high, found.method) == (0.0, "Student")


def test_nats_that_happen_to_be_0_or_1_are_not_outcomes():
    assert paired_interval([0.0, 0.0], [0.0, 0.0], rate=False)[:3] == (0.0, 0.0, 0.0)
    assert paired_interval([0.0, 0.0], [0.0, 0.0]).low < 0
