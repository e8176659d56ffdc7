"""How circuits overlap, and what heads do when they are pointed elsewhere."""

import pytest
import torch

from attnlab.lens.circuits.overlap import (
    circuit_of,
    in_list_accuracy,
    make_inhibit,
    overlap,
    overlap_by_role,
    top_heads,
)
from attnlab.lens.edits.heads import Ablate
from attnlab.lens.steer import steer
from attnlab.lens.toys import recall

IOI, COLOURS = {(1, 0), (1, 1), (2, 3), (4, 4)}, {(1, 1), (2, 3), (4, 4), (5, 0), (5, 1)}


def test_an_overlap_is_a_share_of_one_the_other_or_both() -> None:
    assert overlap(IOI, COLOURS) == 3 / 4
    assert overlap(IOI, COLOURS, of="other") == 3 / 5
    assert overlap(IOI, COLOURS, of="union") == 3 / 6
    assert overlap(IOI, IOI, of="union") == 1 and overlap(IOI, {(0, 0)}) == 0


def test_roles_are_compared_each_for_itself_and_together() -> None:
    one = dict(mover={(5, 0), (5, 1)}, inhibition={(3, 1)})
    other = dict(mover={(5, 1)}, inhibition=set(), duplicate={(1, 1)})
    assert overlap_by_role(one, other) == dict(mover=0.5, inhibition=0.0, all=1 / 3)
    assert overlap_by_role(one, other, of="union") == dict(mover=0.5, inhibition=0.0, duplicate=0.0, all=1 / 4)


def test_heads_with_large_effects_are_the_circuit() -> None:
    effects = torch.tensor([[0.0, -0.5, 0.1], [0.3, 0.02, 0.2]])
    assert circuit_of(effects, 0.15) == {(0, 1), (1, 0), (1, 2)}
    assert top_heads(effects, 2) == [(0, 1), (1, 0)]


def test_pointed_at_another_value_the_retrieval_heads_say_it(recalling) -> None:
    prompts = recall.batch(128, seed=1)
    other = recall.corrupted(prompts, seed=2)
    heads = [(1, h) for h in range(8)]
    with steer(recalling, make_inhibit(heads, other.places[:, None])):
        said = recalling(prompts.ids)[:, -1].argmax(-1)
    assert (said == other.answers).double().mean() > 0.95


def test_idle_heads_that_are_pointed_do_their_part_again(recalling) -> None:
    prompts = recall.batch(128, seed=1)
    values = prompts.ids[:, 1::2]
    idle = Ablate("mean", layers=0)  # what tells the retrieval heads where to look
    with steer(recalling, [idle]):
        broken = in_list_accuracy(recalling(prompts.ids), values, prompts.answers)
    pointed = make_inhibit([(1, h) for h in range(8)], prompts.places[:, None])
    with steer(recalling, [idle, *pointed]):
        repaired = in_list_accuracy(recalling(prompts.ids), values, prompts.answers)
    assert broken < 0.5 < 0.93 < repaired


def test_accuracy_is_among_the_choices() -> None:
    logits = torch.tensor([[5.0, 1.0, 2.0, 0.0], [5.0, 1.0, 2.0, 3.0]])
    choices = torch.tensor([[1, 2], [3, -1]])
    assert in_list_accuracy(logits, choices, torch.tensor([2, 3])) == 1.0
    assert in_list_accuracy(logits[:, None], choices, torch.tensor([1, 3])) == 0.5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: overlap(IOI, COLOURS, of="all"), "of must be"),
        (lambda: overlap(set(), COLOURS), "no head in one"),
        (lambda: top_heads(torch.zeros(2, 2), 5), "count must"),
    ],
)
def test_what_means_nothing_is_refused(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
