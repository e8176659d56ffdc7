"""ROUGE-1 recall, and the stems that it counts."""

from __future__ import annotations

import pytest

from attnlab.lens.measures.rouge import rouge1_recall, stem


@pytest.mark.parametrize(
    ("word", "wanted"),
    # From Porter's paper, one or two of each rule, and where NLTK differs from it: flies, dies, enjoying, skies.
    [pair.split() for pair in (
        "caresses caress, ponies poni, cats cat, dies die, skies sky, agreed agre, plastered plaster, bled bled, "
        "motoring motor, sing sing, conflated conflat, troubling troubl, sized size, hopping hop, falling fall, "
        "hissing hiss, filing file, happy happi, enjoy enjoy, relational relat, conditional condit, digitizer digit, "
        "radically radic, vietnamization vietnam, predication predic, operator oper, feudalism feudal, "
        "decisiveness decis, hopefulness hope, formality formal, sensibility sensibl, triplicate triplic, "
        "formative form, electrical electr, goodness good, revival reviv, allowance allow, inference infer, "
        "adjustment adjust, adoption adopt, communism commun, effective effect, bowdlerize bowdler, probate probat, "
        "rate rate, cease ceas, controll control, roll roll, sandwich sandwich, francisco francisco, died die, "
        "analogies analog"
    ).split(", ")],
)  # fmt: skip
def test_stems(word: str, wanted: str) -> None:
    assert stem(word) == wanted


def test_recall_is_the_share_of_the_reference() -> None:
    answer = "eat a sandwich and sit in Dolores Park on a sunny day."
    assert rouge1_recall(answer, answer.upper()) == 1.0
    assert rouge1_recall(answer, "Eating sandwiches, sitting in the park on sunny days.") == pytest.approx(8 / 12)
    assert rouge1_recall(answer, "") == 0.0
    assert rouge1_recall("a a b", "a c") == pytest.approx(1 / 3)  # as often as it is said
    assert rouge1_recall("", "word") == 0.0
