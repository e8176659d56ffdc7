"""Listening to a model's own text: what later look-ups need is an anchor, and the maps are the model's."""

from __future__ import annotations

import pytest
import torch

from attnlab.lens.measures.anchors import fai, head_groups, mean_distances, multipliers, rhythm
from attnlab.lens.reasoning import credit, listen, middle_layers
from attnlab.lens.tap import Subscriber, tap
from attnlab.lens.toys import chains
from attnlab.lens.what_if import alternatives, jaccard, reroll


@pytest.fixture(scope="module")
def model():
    """A decoder that follows chains of links."""
    return chains.train()


class Maps(Subscriber):
    def __init__(self) -> None:
        self.layers: list[torch.Tensor] = []

    def after(self, event, out) -> None:
        self.layers.append(event.weights().detach())


def maps_of(model, ids: torch.Tensor) -> torch.Tensor:
    with tap(model) as opened, torch.no_grad():
        opened.subscribe(watch := Maps())
        model(ids)
    return torch.cat(watch.layers, 1)


def test_what_later_look_ups_need_has_more_influence_than_fillers(model) -> None:
    """Links `a · b` are told first, 24 tokens; then the chain, each word of which is found at a b."""
    ids = chains.batch(48, seed=7)
    assert chains.accuracy(model, ids) > 0.95
    needed, fillers = [], []
    for maps in maps_of(model, ids):
        _, broad = head_groups(mean_distances(maps, 24))
        influence = fai(maps[broad].mean(0), 24)[:24].view(8, 3)
        fillers.append(influence[:, 1])
        needed.append(influence[:, 2])
    wins = (torch.cat(needed)[:, None] > torch.cat(fillers)).double().mean()
    assert wins > 0.8  # AUROC; measured: 0.87, since the last links are too near to be counted for most queries


def test_what_has_influence_changes_what_is_written_when_it_is_changed(model) -> None:
    """Tokens before the chain, those of high FAI against those of low: less comes out alike, as in the paper."""
    alike: dict[bool, list[float]] = {True: [], False: []}
    for ids in chains.batch(16, seed=11):
        maps = maps_of(model, ids[None])[0]
        _, broad = head_groups(mean_distances(maps, 24))
        # Of the first links, which all later look-ups are far enough from to be counted.
        order = fai(maps[broad].mean(0), 24)[:14].argsort(stable=True)
        for high, places in ((False, order[:2]), (True, order[-2:])):
            for place in places.tolist():
                kind = range(chains.WORDS) if ids[place] < chains.WORDS else range(chains.WORDS, chains.VOCABULARY)
                token = next(t for t in kind if t not in ids)  # a filler for a filler, a word that was not told
                alike[high].append(jaccard(reroll(model, ids, place, token, start=25), ids[25:].tolist()))
    low, high = (sum(alike[key]) / len(alike[key]) for key in (False, True))
    assert low > 0.9 and high < low - 0.15  # measured: 0.94 and 0.58


def test_a_reroll_is_greedy_writing_after_the_change(model) -> None:
    ids = chains.batch(1, seed=2)[0]
    assert reroll(model, ids, 24, int(ids[24])) == ids[25:].tolist()
    best = alternatives(model, ids, 25, 3)
    assert len(best) == 3 and int(ids[25]) not in best
    assert len(reroll(model, ids, 25, best[0], new=4)) == 4


def test_jaccard_is_what_both_have() -> None:
    assert jaccard([1, 2, 2, 3], [3, 4]) == 1 / 4
    assert jaccard([1, 2, 9], [2, 9, 8], skip=[9]) == 1 / 3
    assert jaccard([], []) == 1.0


def test_listening_is_the_rhythm_of_the_middle_layers() -> None:
    model = chains.small_decoder(chains.VOCABULARY, depth=6)
    ids = chains.batch(1, seed=3)[0]
    maps = maps_of(model, ids[None])[0].unflatten(0, (6, 4))
    wanted = rhythm(maps[2:5].flatten(0, 1), 24, lo=2, hi=9)
    for layers in (None, [2, 3, 4]):
        heard = listen(model, ids, 24, layers=layers, lo=2, hi=9)
        torch.testing.assert_close(heard, wanted)
    torch.testing.assert_close(
        credit(model, ids, 24, "local", lo=2, hi=9), multipliers(wanted.waad, wanted.fai, "local")
    )


def test_any_model_of_transformers_can_be_listened_to(transformers) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    gamma = credit(model, torch.randint(64, (40,)), 10)
    assert gamma.shape == (30,) and 1 <= gamma.min() and gamma.max() <= 2
    assert (gamma > 1).sum() >= 12


def test_the_middle_layers_are_those_of_the_paper() -> None:
    assert middle_layers(36) == [12, 15, 18, 21, 24]
    assert middle_layers(2) == [0, 1] and middle_layers(1) == [0]


def test_bad_input_is_named() -> None:
    model, ids = chains.small_decoder(chains.VOCABULARY), chains.batch(2, seed=0)
    with pytest.raises(ValueError, match="of one text"):
        listen(model, ids, 24)
    with pytest.raises(ValueError, match="prompt must leave"):
        listen(model, ids[0], 33)
    with pytest.raises(ValueError, match="layers must name"):
        listen(model, ids[0], 24, layers=[])
    with pytest.raises(ValueError, match="position must lie"):
        alternatives(model, ids[0], 0)
    with pytest.raises(ValueError, match="position < start"):
        reroll(model, ids[0], 5, 1, start=4)
