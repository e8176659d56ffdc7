"""How much of a text another one says again: ROUGE-1 recall over the stems of English words."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise

# Endings and what replaces them, where what is left has a syllable before it (Porter's m > 0).
_LONG = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
)  # fmt: skip
_MIDDLE = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
# Endings that fall where two syllables are left (m > 1).
_SHORT = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip
_KNOWN = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning",
    "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning",
    "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip


def rouge1_recall(reference: str, response: str) -> float:
    """What share of the reference's words the response says, each as often as it does at most: 0 to 1.

    Words are runs of letters and digits, in lower case, those of more than three by their stem: as in Google's
    `rouge_score`. Source: Lin 2004.
    """
    said, wanted = Counter(_words(response)), Counter(_words(reference))
    return sum((wanted & said).values()) / max(1, sum(wanted.values()))


def _words(text: str) -> list[str]:
    return [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Porter's stem of a word in lower case (Porter 1980), with the changes that NLTK made."""
    if word in _KNOWN:
        return _KNOWN[word]
    if len(word) <= 2:
        return word
    word = _verb(_plural(word))
    if word.endswith("y") and len(word) > 2 and _consonants(word)[-2]:
        word = word[:-1] + "i"
    word = _replaced(_double(word), _MIDDLE)
    for ending in sorted(_SHORT, key=len, reverse=True):
        if word.endswith(ending) and (ending != "ion" or word[:-3][-1:] in ("s", "t")):
            word = word[: -len(ending)] if _measure(word[: -len(ending)]) > 1 else word
            break
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _closed(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    for ending, other in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(ending):
            return word[: len(word) - len(ending)] + other
    return word


def _verb(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        rest = word[: -len(ending)]
        if word.endswith(ending) and not all(_consonants(rest)):
            if rest.endswith(("at", "bl", "iz")):
                return rest + "e"
            if len(rest) > 1 and rest[-1] == rest[-2] and _consonants(rest)[-1]:
                return rest if rest[-1] in "lsz" else rest[:-1]
            return rest + "e" if _measure(rest) == 1 and _closed(rest) else rest
    return word


def _double(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _double(word[:-2])
    if word.endswith("logi") and not word.endswith(tuple(e for e, _ in _LONG)):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replaced(word, _LONG)


def _replaced(word: str, endings: tuple[tuple[str, str], ...]) -> str:
    for ending, other in sorted(endings, key=lambda pair: -len(pair[0])):
        if word.endswith(ending):
            rest = word[: len(word) - len(ending)]
            return rest + other if _measure(rest) > 0 else word
    return word


def _consonants(word: str) -> list[bool]:
    """Whether each letter is a consonant; y is one at the start and after a vowel."""
    kinds: list[bool] = []
    for letter in word:
        kinds.append(letter not in "aeiou" and (letter != "y" or not kinds or not kinds[-1]))
    return kinds


def _measure(word: str) -> int:
    """How many times vowels are followed by consonants."""
    kinds = _consonants(word)
    return sum(not a and b for a, b in pairwise(kinds))


def _closed(word: str) -> bool:
    """Whether it ends in consonant, vowel, consonant but w, x, y; or is a vowel and a consonant."""
    kinds = _consonants(word)
    if len(word) == 2:
        return kinds == [False, True]
    return kinds[-3:] == [True, False, True] and word[-1] not in "wxy"
