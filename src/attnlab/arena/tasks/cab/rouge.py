"""ROUGE (Lin 2004): how many words, pairs of words, or words in order two texts share, as F-measures in per cent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def rouge(found: Sequence[str], truth: Sequence[str]) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of a text against one reference, both as words."""
    shared = _longest_common(found, truth)
    return (
        100 * _of_runs(found, truth, 1),
        100 * _of_runs(found, truth, 2),
        100 * _balanced(shared, len(found), len(truth)),
    )


def _of_runs(found: Sequence[str], truth: Sequence[str], size: int) -> float:
    """Over runs of `size` words, each counted as often as it is in both."""
    ours, theirs = (Counter(zip(*(text[i:] for i in range(size)), strict=False)) for text in (found, truth))
    return _balanced((ours & theirs).total(), ours.total(), theirs.total())


def _balanced(shared: int, found: int, truth: int) -> float:
    """The harmonic mean of precision and recall."""
    return 2 * shared / (found + truth) if shared else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
