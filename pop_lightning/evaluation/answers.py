"""Measures of freely generated answers: against a reference, or of one model's answer against another's."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

# Scripts that put no spaces between words (Thai, kana, Han): each character counts as a word.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_CHUNK = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, reference: str) -> float:
    """1.0 where both are the same text, white space at the ends left out."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """The F1 of SQuAD (Rajpurkar et al., arXiv 1606.05250): of the words that both have, as bags.

    As in SQuAD's script, case, punctuation and the articles a, an and the do not count, and where one of both has no
    word left the score is 1 if the other has none either.
    """
    found, wanted = _squad_words(answer), _squad_words(reference)
    if not found or not wanted:
        return float(found == wanted)
    same = (Counter(found) & Counter(wanted)).total()
    return _f_measure(same, len(found), len(wanted))


def _squad_words(text: str) -> list[str]:
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return _CHUNK.findall(text)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin, 2004): the F-measure of the longest common subsequence of words.

    Words are runs of letters and digits in lower case, without stemming, as in the ``rouge_score`` package; 0 where
    one of both has none.
    """
    found, wanted = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    return _f_measure(_common_subsequence(found, wanted), len(found), len(wanted))


def _f_measure(same: int, found: int, wanted: int) -> float:
    return 2 * same / (found + wanted) if same else 0.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, a row of the table at a time as the bits of one number.

    Hyyrö, "Bit-parallel LCS-length computation revisited", 2004.
    """
    where: dict[str, int] = {}
    for place, word in enumerate(first):
        where[word] = where.get(word, 0) | 1 << place
    whole = (1 << len(first)) - 1
    row = whole
    for word in second:
        matches = row & where.get(word, 0)
        row = ((row + matches) | (row - matches)) & whole
    return len(first) - row.bit_count()


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> float:
    """The share of the longer sequence up to the first difference; 1.0 where both are empty."""
    longer = max(len(first), len(second))
    pairs = zip(first, second, strict=False)
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return same / longer if longer else 1.0
