"""Prompts in pairs: what is asked, what is right, and that a pair differs in one thing."""

import pytest
import torch

from attnlab.lens.circuits.prompts import (
    COLOURS,
    NAMES,
    OBJECTS,
    SURFACES,
    Words,
    coloured_objects,
    encode,
    equally_long,
    greater_than,
    indirect_objects,
    three_names,
)


def differing(one: str, other: str) -> list[tuple[str, str]]:
    return [(a, b) for a, b in zip(one.split(), other.split(), strict=True) if a != b]


def test_the_indirect_object_is_named_once_and_the_corrupt_prompt_changes_the_giver() -> None:
    pairs = indirect_objects(200)
    for pair in pairs:
        right, (wrong,) = pair.right.strip(), pair.wrong
        assert pair.clean.count(right) == 1 and pair.clean.count(wrong.strip()) == 2
        assert differing(pair.clean, pair.corrupt) == [(wrong.strip(), right)]
    first = [p.clean.find(p.right.strip()) < p.clean.find(p.wrong[0].strip()) for p in pairs]
    assert 0.3 < sum(first) / 200 < 0.7  # both orders


def test_three_names_have_no_answer() -> None:
    for prompt in three_names(50):
        words = prompt.replace(",", " ").split()
        assert sorted(words.count(n) for n in NAMES if n in words) == [1, 1, 1]


def test_years_that_begin_at_one_leave_nothing_to_compare() -> None:
    for pair in greater_than(50):
        (year, first) = differing(pair.clean, pair.corrupt)[0]
        assert first.endswith("01") and year[:2] == first[:2] == pair.clean[-2:]
        assert int(pair.wrong[0]) < int(year[2:]) < int(pair.right) < 100


def test_coloured_objects_ask_for_one_of_three_and_the_corrupt_one_for_none() -> None:
    assert (len(COLOURS), len(OBJECTS), len(SURFACES)) == (8, 17, 3)
    for pair in coloured_objects(100):
        before, clean = pair.clean.split("\n\n")
        assert before.startswith("Q: On the ") and before.split("\nA:")[1].strip() in COLOURS
        asked = clean.split("What color is the ")[1].removesuffix("?\nA:")
        assert f"{pair.right} {asked}" in clean and len(pair.wrong) == 2
        assert all(f"{w} " in clean for w in pair.wrong) and pair.right not in pair.wrong
        other = pair.corrupt.split("What color is the ")[-1].removesuffix("?\nA:")
        listed = pair.corrupt.split("\n\n")[1].split("What color")[0]
        assert other in OBJECTS and f" {other}," not in listed and f" {other}." not in listed
        assert pair.corrupt.removesuffix(f"{other}?\nA:") == pair.clean.removesuffix(f"{asked}?\nA:")


def test_a_seed_draws_the_same_prompts() -> None:
    assert indirect_objects(5, seed=3) == indirect_objects(5, seed=3) != indirect_objects(5, seed=4)
    assert coloured_objects(5, seed=3) == coloured_objects(5, seed=3) != coloured_objects(5, seed=4)


def test_shots_and_items_are_as_many_as_asked_for() -> None:
    (pair,) = coloured_objects(1, items=5, shots=2)
    assert pair.clean.count("Q:") == 3 and len(pair.wrong) == 4
    assert coloured_objects(1, shots=0)[0].clean.count("Q:") == 1


def test_pairs_become_ids_of_one_length_for_toys() -> None:
    words = Words()
    pairs = equally_long(indirect_objects(100), words)[0]
    clean, corrupt, answers = encode(pairs, words)
    assert clean.shape == corrupt.shape and len(clean) == len(pairs) > 10
    assert ((clean != corrupt).sum(1) == 1).all()
    assert words.text(answers[0]) == f"{pairs[0].right} {pairs[0].wrong[0]}".replace("  ", " ").strip()
    assert bool((clean == answers[:, :1]).sum(1).eq(1).all())
    groups = equally_long(coloured_objects(200), words)
    assert sum(map(len, groups)) < 200  # "fidget spinner" is two words
    assert encode(groups[0], words)[0].max() < len(words)
    with pytest.raises(ValueError, match="equally long"):
        encode([*groups[0][:1], *groups[1][:1]], words)
    with pytest.raises(ValueError, match="not known: xylophone"):
        words("a xylophone")


@pytest.mark.parametrize(
    "call", [lambda: indirect_objects(0), lambda: coloured_objects(1, items=1), lambda: three_names(-1)]
)
def test_what_is_not_possible_is_refused(call) -> None:
    with pytest.raises(ValueError, match="must"):
        call()


def test_text_of_tokens_is_the_words() -> None:
    words = Words(["a red pen."])
    assert words.text(torch.tensor(words("a pen."))) == "a pen ."
