import pytest
import torch

from attnlab import cards
from attnlab.arena import network, study
from attnlab.arena.influence import influence
from attnlab.arena.network import NONE, Network, refuses, solve, takes_part
from attnlab.arena.task import CAUSAL, CAUSAL_CROSS, CROSS, GRID, Task, find_task, tasks

DEFAULTS = [NONE, *(name for name in study.MECHANISMS if name in cards.names())]


@pytest.fixture(scope="module")
def ready():
    return {name: find_task(name)("small") for name in ("text", "textures", "photos-x2", "series", "recall", "needle")}


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_default_mechanism_meets_every_budget_within_two_percent(ready, name):
    met = 0
    for it in ready.values():
        if takes_part(name, type(it)):
            continue
        shape = solve(it, name)
        with torch.device("meta"):
            built = sum(p.numel() for p in Network(it, name, shape.width, shape.hidden).parameters())
        assert shape.parameters == built
        assert abs(built / it.budget.parameters - 1) <= 0.02
        met += 1
    assert met >= 2


@pytest.mark.parametrize("name", [name for name in cards.names(kind="tokens") if not takes_part(name, tasks()["text"])])
def test_mechanisms_are_built_causal_for_sequences(name):
    seen = influence(name, CAUSAL, length=48, width=32)
    # A convolution by Fourier transforms rounds in both directions.
    assert seen.triu(1).max() <= (1e-6 if name == "s4d" else 0)
    assert seen.tril(-1).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in DEFAULTS[1:] if cards.describe(name).claims(cards.ALL_FOUR)])
def test_mechanisms_look_both_ways_on_a_grid(name):
    assert influence(name, GRID, length=36, width=32).triu(1).max() > 0


@pytest.mark.parametrize("layout", [CROSS, CAUSAL_CROSS])
def test_queries_look_into_the_context_and_no_further_than_they_may(layout):
    module = network.mixer("multihead", 32, layout)
    x = torch.randn(1, 12, 32, requires_grad=True)
    y = module(x)
    assert (y[:, :6] == 0).all()  # the context is not mixed
    (seen,) = torch.autograd.grad(y[0, 6 + 2].sum(), x)
    reached = seen[0].norm(dim=-1) > 0
    visible = [True] * 6 if layout == CROSS else [True] * 3 + [False] * 3
    assert reached.tolist() == [*visible, False, False, True, False, False, False]


def test_every_mechanism_can_take_part_in_a_task_for_each_of_the_four_capabilities_that_it_claims():
    asks = {"textures": cards.NONCAUSAL_SELF, "recall": cards.CAUSAL_SELF, "lookup": cards.NONCAUSAL_CROSS}
    asks["causal-lookup"] = cards.CAUSAL_CROSS
    for task, capability in asks.items():
        for name in cards.names(kind="tokens", capability=capability):
            # Those that need a grid to know what came before read it row by row.
            on_grids = capability == cards.CAUSAL_SELF and not cards.describe(name).claims(cards.ANY_LENGTH)
            chosen = "pixels" if on_grids else task
            assert not takes_part(name, tasks()[chosen]), (name, chosen)
            assert not (on_grids and refuses(name, find_task(chosen)("small"))), (name, chosen)


def test_the_control_passes_its_tokens_by():
    assert (network.mixer(NONE, 8, CAUSAL)(torch.randn(1, 4, 8)) == 0).all()


@pytest.mark.parametrize(
    ("name", "task", "reason"),
    [
        ("agent", "text", "not causal"),
        ("focal", "recall", "feature maps"),
        ("kda", "textures", "only looks back"),
        ("llama", "text", "is a lm"),
        ("multihead", "text", ""),
        ("neighborhood", "series", "works on grids"),
        ("neighborhood", "pixels", ""),
        ("axial", "pixels", ""),
        ("agent", "pixels", "not causal"),
        ("focal", "pixels", "feature maps"),
        ("focal", "photos-x2", ""),
        ("neighborhood", "textures", ""),
        ("kda", "lookup", "another sequence"),
        ("power", "causal-lookup", ""),
        ("focal", "lookup", "feature maps"),
        (NONE, "needle", ""),
    ],
)
def test_who_is_left_out_is_told_why(name, task, reason):
    found = takes_part(name, tasks()[task])
    assert reason in found and bool(reason) == bool(found)


def test_a_budget_that_cannot_be_met_is_an_error(ready):
    class Tiny(type(ready["recall"])):
        budgets = {"small": ready["recall"].budget.__class__(100, 2, 1, 1, 16)}

    with pytest.raises(ValueError, match="100 parameters cannot be met"):
        solve(Tiny("small"), "multihead")


def test_all_mechanisms_see_the_same_batches_in_the_same_order(monkeypatch, toys):
    from attnlab.arena.train import run_trial

    it: Task = find_task("sums")("small")
    given: dict[str, list] = {}
    batch = it.batch

    def noted(rng):
        made = batch(rng)
        given[current].append(made[0])
        return made

    monkeypatch.setattr(it, "batch", noted)
    for current in ("toy", NONE, "toy_sees_all"):
        given[current] = []
        assert run_trial(it, current, seed=3).status == "done"
    assert len(given["toy"]) > it.budget.steps - 1
    assert all(torch.equal(a, b) for a, b in zip(given["toy"], given[NONE], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given["toy"], given["toy_sees_all"], strict=True))


def test_who_takes_positions_gets_rotary_ones_where_the_task_has_them(ready):
    built = {
        (name, it): network.mixer(name, 32, CAUSAL, positions=ready[it].positions)
        for name in ("multihead", "sliding_window", "reduced", "linear", "kda")
        for it in ("text", "recall")
    }
    turned = {key for key, module in built.items() if getattr(module, "position", None) is not None}
    assert turned == {("multihead", "text"), ("sliding_window", "text"), ("reduced", "text")}
    assert all(module(torch.randn(1, 8, 32), grid=None).shape == (1, 8, 32) for module in built.values())


def test_a_mechanism_that_does_not_take_the_grid_says_so(ready):
    assert "3 axes" in network.refuses("block_routing", ready["textures"])  # blocks of video
    assert network.refuses("focal", ready["textures"]) == network.refuses("multihead", ready["text"]) == ""
