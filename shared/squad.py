"""Exact match and F1 of an answer, as SQuAD's own evaluation computes them (Rajpurkar et al. 2016, section 6.1).

Both compare with every right answer and keep the best. A question that has none is answered by the empty text.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and extra blanks."""
    bare = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(given: str, answers: Sequence[str]) -> float:
    """1 where the given answer is one of the right ones; else 0."""
    return float(any(normalised(given) == normalised(answer) for answer in answers or ("",)))


def f1(given: str, answers: Sequence[str]) -> float:
    """F1 of the words that a given answer shares with the right one that it is nearest to."""
    return max(_f1(normalised(given).split(), normalised(answer).split()) for answer in answers or ("",))


def _f1(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    shared = sum((Counter(given) & Counter(right)).values())
    return 2 * shared / (len(given) + len(right))
