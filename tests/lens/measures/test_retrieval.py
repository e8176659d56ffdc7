"""Retrieval scores: closed forms, what counts as a copy, and the heads that they name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab.lens.measures.retrieval import HeadScores, find_needle, retrieval_scores

PROMPT = [7, 3, 9, 1, 2, 3, 4, 5, 8, 6, 7]
SPAN = (3, 8)  # 1 2 3 4 5


def looking_at(*keys: int, size: int = 11) -> list[Tensor]:
    """One layer and one head that looks at one key in each step, of ever more."""
    return [torch.nn.functional.one_hot(torch.tensor(k), size + n)[None, None].float() for n, k in enumerate(keys)]


def score(keys: tuple[int, ...], written: list[int], **keywords) -> float:
    return retrieval_scores(looking_at(*keys), written, PROMPT, SPAN, **keywords).item()


def test_copying_the_whole_needle_in_order_scores_one() -> None:
    assert score((3, 4, 5, 6, 7), [1, 2, 3, 4, 5]) == pytest.approx(1.0)


def test_each_right_step_is_one_over_the_needle() -> None:
    assert score((3, 4, 0, 0, 0), [1, 2, 3, 4, 5]) == pytest.approx(2 / 5)
    assert score((3,), [1]) == pytest.approx(1 / 5)


def test_repeating_the_needle_scores_more_than_one() -> None:
    assert score((3, 4, 5, 6, 7, 3), [1, 2, 3, 4, 5, 1]) == pytest.approx(6 / 5)


def test_what_counts_is_what_is_written_next_and_where_it_is_read() -> None:
    assert score((3,), [2]) == 0  # looks at 1 and writes 2
    assert score((1,), [3]) == 0  # the same token outside the needle
    assert score((5,), [3]) > 0
    assert score((0, 11), [9, 9]) == 0  # a key that was written, after the prompt


def test_of_the_best_keys_any_may_be_it_but_a_step_counts_once() -> None:
    row = torch.zeros(1, 2, 11)
    row[0, 0, [0, 5]] = torch.tensor([0.6, 0.4])
    row[0, 1, [5, 6]] = torch.tensor([0.6, 0.4])
    found = [retrieval_scores([row], [3], PROMPT, SPAN, top=top)[0].tolist() for top in (1, 2)]
    assert found == [[0.0, 0.2], [0.2, 0.2]]
    twice = [4, 4, 9, 4]
    both = torch.tensor([[[0.5, 0.4, 0.0, 0.1]]])
    assert retrieval_scores([both], [4], twice, (0, 2), top=2).item() == 0.5


def test_a_needle_that_is_not_there_scores_nothing() -> None:
    assert retrieval_scores(looking_at(3, 10), [1, 7], PROMPT, (-1, -1)).item() == 0


def test_needles_are_found_as_sets() -> None:
    assert find_needle(PROMPT, [1, 2, 3, 4, 5]) == (3, 8)
    assert find_needle(torch.tensor(PROMPT), torch.tensor([5, 4, 3, 2, 1])) == (3, 8)
    assert find_needle(PROMPT, [1, 2, 3, 4, 99]) == (-1, -1)  # 4 of 5 is not more than 0.9
    assert find_needle(PROMPT, [1, 2, 3, 4, 99], share=0.7) == (2, 7)  # the first one that will do
    assert find_needle([6, 7], [6, 7, 6]) == (0, 3)  # a window may end after the prompt


def tables(*values: list[list[float]]) -> HeadScores:
    scores = HeadScores()
    for value in values:
        scores.add(torch.tensor(value))
    return scores


def test_heads_are_named_best_first() -> None:
    scores = tables([[0.0, 0.4], [0.9, 0.05]], [[0.0, 0.2], [1.0, 0.05]])
    assert scores.mean().tolist() == [[0, pytest.approx(0.3)], [pytest.approx(0.95), pytest.approx(0.05)]]
    assert scores.retrieval() == [(1, 0), (0, 1)] == scores.best(2)
    assert scores.ranked() == [(1, 0), (0, 1), (1, 1), (0, 0)]
    picked = scores.others(2, outside=2, generator=torch.Generator().manual_seed(0))
    assert sorted(picked) == [(0, 0), (1, 1)]


def test_scores_survive_a_file_in_the_layout_of_the_authors(tmp_path) -> None:
    scores = tables([[0.0, 0.5, 1.0]], [[0.25, 0.5, 0.0]])
    scores.save(tmp_path / "heads.json")
    assert (tmp_path / "heads.json").read_text() == '{"0-0": [0.0, 0.25], "0-1": [0.5, 0.5], "0-2": [1.0, 0.0]}'
    again = HeadScores.load(tmp_path / "heads.json")
    assert all(torch.equal(a, b) for a, b in zip(again.tables, scores.tables, strict=True))


def test_bad_input_is_named(tmp_path) -> None:
    (tmp_path / "bad.json").write_text('{"0-0": [1.0], "1-1": [1.0]}')
    scores = tables([[0.0, 0.5]])
    for call, message in (
        (lambda: find_needle(PROMPT, []), "needle must hold"),
        (lambda: retrieval_scores(looking_at(1), [1, 2], PROMPT, SPAN), "each of the 2"),
        (lambda: retrieval_scores([torch.rand(4, 5)], [1], PROMPT, SPAN), "layers, heads, keys"),
        (lambda: retrieval_scores(looking_at(1), [1], PROMPT, SPAN, top=0), "top"),
        (lambda: HeadScores().mean(), "no trial was accepted"),
        (lambda: scores.add(torch.rand(3, 3)), "as the others are"),
        (lambda: scores.others(1), "outside the 100 best"),
        (lambda: scores.best(3), "count must lie"),
        (lambda: HeadScores.load(tmp_path / "bad.json"), "no table of scores"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
