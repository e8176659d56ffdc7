import math

import pytest

from attnlab.arena.summary import Row, answer, number, score

ABOUT = {"better": "lower", "metric": "bits", "trivial": ["guess", 8.0], "title": "", "layout": "causal"}
HIGHER = {**ABOUT, "better": "higher", "metric": "accuracy", "trivial": ["guess", 0.1]}


def row(mechanism, *scores, speed=1000.0, status="done"):
    same = {"task": "t", "mechanism": mechanism, "status": status, "tokens_per_second": speed, "reason": ""}
    return Row("t", mechanism, [{**same, "seed": i, "score": score} for i, score in enumerate(scores)])


def test_the_best_is_used_when_nothing_is_as_good():
    found = answer(ABOUT, [row("a", 1.0, 1.1, 1.2), row("b", 2.0, 2.1, 2.2), row("none", 4.0, 4.1)])
    assert (found.use, found.best, found.tied) == ("a", "a", ["a"])
    assert found.sentence == "a, 1.1 ± 0.1 bits (guess has 8.00): clearly the best; next is b with 2.10"


def test_the_fastest_within_the_spread_of_the_best_is_used():
    found = answer(ABOUT, [row("a", 1.0, 1.2, speed=100), row("b", 1.1, 1.3, speed=300), row("c", 1.5, 1.6, speed=900)])
    assert (found.use, found.tied) == ("b", ["a", "b"])
    assert "as good as a (1.10) within the spread, and trains 3.0× as fast" in found.sentence


def test_varying_a_lot_does_not_make_good():
    found = answer(HIGHER, [row("a", 0.95, 0.96, speed=1), row("b", 0.6, 1.0, speed=100)])
    assert found.use == "a" and found.tied == ["a"]


def test_one_seed_claims_no_tie():
    found = answer(ABOUT, [row("a", 1.0), row("b", 1.0001, speed=9000)])
    assert found.use == "a"
    assert "without knowing the spread" in found.sentence


def test_a_mechanism_that_helps_no_more_than_none_is_not_recommended():
    found = answer(ABOUT, [row("a", 1.0, 1.2), row("none", 1.05, 1.25)])
    assert found.use == "none"
    assert "a (1.10) is no better within the spread" in found.sentence


def test_nothing_is_recommended_that_did_not_learn():
    found = answer(HIGHER, [row("a", 0.08, 0.09), row("b", 0.05, 0.06)])
    assert found.use == "none"
    assert "nothing learned more than guess" in found.sentence


def test_what_diverged_with_a_seed_is_not_recommended():
    shaky, steady = row("a", 1.0, 1.1), row("b", 2.0, 2.1)
    shaky.trials.append({**row("a", None, status="diverged").trials[0], "seed": 2})
    assert answer(ABOUT, [shaky, steady]).use == "b"
    assert answer(ABOUT, [shaky]).use == "a"


def test_trials_that_gave_no_score_are_no_answer():
    bad = row("a", None, status="diverged")
    assert bad.mean is None and bad.spread is None and bad.trouble == "diverged: "
    assert "no mechanism came to a score" in answer(ABOUT, [bad]).sentence


def test_curves_are_means_with_their_range():
    it = Row("t", "a", [{"curve": [[1, 2.0], [2, 1.0]]}, {"curve": [[1, 4.0]]}])
    assert it.curve() == [(1, 3.0, 2.0, 4.0), (2, 1.0, 1.0, 1.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.03123, "0.0312"),
        (3.0512, "3.05"),
        (29.94, "29.9"),
        (12345.6, "12,300"),
        (0, "0"),
        (None, "–"),
        (-2.5, "-2.50"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
    assert number(math.nan) == "nan"


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ((29.93, 29.95, 29.97), "29.95 ± 0.02"),
        ((1.0, 1.0), "1.000 ± 0"),
        ((3.0512,), "3.051"),
        ((120.0, 140.0), "130 ± 14"),
    ],
)
def test_scores_end_where_their_spread_begins(scores, text):
    assert score(row("a", *scores)) == text
