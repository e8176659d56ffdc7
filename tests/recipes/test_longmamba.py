"""LongMamba: what is calibrated and filtered, on whom, and that an early token outlives sixteen training lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnlab.models.language.mamba import MambaLM
from attnlab.nn.linear.selective import Mamba2
from attnlab.recipes import longmamba as recipe
from attnlab.recipes.longmamba import Calibration, calibrate, calibration, combine, longmamba

TRAINED, LONG, WORDS = 64, 1024, 1000
LENGTHS = (32, 64, 128, 256, 512, 1024)


def steps(n: int, channels: int = 5) -> Tensor:
    return 0.1 * torch.rand(2, n, channels).pow(3)


def table(channels: int = 5) -> Calibration:
    return calibration(steps(TRAINED, channels)[0], -torch.rand(channels), trained=TRAINED, lengths=LENGTHS)


def test_the_kept_steps_sum_to_what_they_did_at_the_training_length():
    """Within a tenth, with thresholds from other texts of the same kind; all steps together sum to 16 times as much."""
    tables = [
        calibration(steps(1000)[0], -torch.ones(5), clamp=1e-3, trained=1000, lengths=(16000,)) for _ in range(30)
    ]
    to, delta = combine(tables), steps(16000)
    assert (delta.sum(1) / to.total > 14).all()
    kept = delta * recipe.above(delta, to.threshold[16000])
    torch.testing.assert_close(kept.sum(1), to.total.expand(2, -1), rtol=0.1, atol=0)


def test_a_threshold_of_zero_keeps_all_steps():
    delta = steps(30) + 1e-6
    assert recipe.above(delta, torch.zeros(5)).all()


def test_lengths_up_to_the_training_length_keep_everything():
    to = table()
    for n in (32, 64):
        assert (to.alpha[n] == 1).all()
        assert (to.threshold[n] == 0).all()
    assert all((to.alpha[n] < 1).all() and (to.threshold[n] > 0).all() for n in LENGTHS[2:])


def test_decay_is_that_of_the_clamped_steps():
    delta = steps(20)[0]
    to = calibration(delta, -torch.arange(1.0, 6), clamp=0.25, trained=20, lengths=(20,))
    clamped = torch.minimum(delta, delta.sort(0, descending=True).values[4])
    torch.testing.assert_close(to.decay, (-torch.arange(1.0, 6) * clamped.sum(0)).exp())


def test_a_channel_of_many_rates_is_as_slow_as_its_slowest():
    delta, a = steps(20)[0], -torch.rand(5, 3)
    many, one = (calibration(delta, r, trained=20, lengths=(20,)) for r in (a, a.amax(1)))
    assert torch.equal(many.decay, one.decay)


@pytest.mark.parametrize("response", [0, 7])
def test_the_response_is_always_taken(response: int):
    delta = steps(40)
    masks = [
        recipe.above(delta, torch.full((5,), 9.0), response),
        recipe.share(delta, torch.full((5,), 0.0), response),
        recipe.bound(delta, torch.zeros(5), response),
        recipe.top(delta, 1, response),
    ]
    for mask in masks:
        assert mask[:, 40 - response :].all()
        assert mask[:, : 40 - response].sum(1).max() <= 1
    tokens = recipe.top_tokens(delta, 3, response)
    assert tokens.shape == (2, 3 + response)
    assert (tokens[:, 3:] == torch.arange(40 - response, 40)).all()


def test_shares_and_bounds_take_the_largest():
    delta = torch.tensor([0.1, 0.4, 0.2, 0.3]).view(1, 4, 1)
    assert recipe.share(delta, torch.tensor([0.5])).flatten().tolist() == [False, True, False, True]
    assert recipe.bound(delta, torch.tensor([0.75])).flatten().tolist() == [False, True, False, True]
    assert recipe.rank(delta, torch.tensor([0.5])).flatten().tolist() == [False, True, True, True]
    torch.testing.assert_close(recipe.scaled(delta, torch.tensor([0.5])).sum(), torch.tensor(0.5))


def make() -> MambaLM:
    """A model whose steps say how important tokens are: the higher the id, the longer."""
    torch.manual_seed(0)
    model = MambaLM(vocabulary=WORDS, dim=16, depth=1, mixer="mamba2", states=8, head_dim=8).eval()
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        model.embedding.weight.normal_()
        model.embedding.weight[:, 0] = torch.linspace(-3, 3, WORDS)
        model.embedding.weight[-2:, 0] = 12.0  # two important ones, which texts have but where a test puts them
        mixer.wi.weight[-mixer.heads :] = 0
        mixer.wi.weight[-mixer.heads :, 0] = 1.0
        mixer.bias.fill_(-4.0)
        # Two heads keep about half of a state over a training text; the others forget within a few tokens.
        mixer.a_log.copy_(torch.tensor([0.25, 0.25, 30.0, 30.0]).log())
    return model


def text(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(WORDS - 2, (1, n), generator=generator)


def influence(model: MambaLM, ids: Tensor) -> float:
    """How much the memory of the global heads after the text depends on which important token stood second."""
    states = []
    for important in (WORDS - 2, WORDS - 1):
        tokens = ids.clone()
        tokens[0, 1] = important
        _, state = model(tokens, model.initial_state(1))
        states.append(state.layers[0].memory[0, :2])
    return (states[0] - states[1]).abs().max().item()


@pytest.fixture
def calibrated() -> tuple[MambaLM, dict[str, Calibration]]:
    model, generator = make(), torch.Generator().manual_seed(1)
    # Clamped at a share s, the threshold can never be higher than what s of all steps pass: here 1/16 must.
    return model, calibrate(model, [text(TRAINED, generator) for _ in range(8)], clamp=0.02, lengths=LENGTHS)


@torch.no_grad()
def test_an_early_token_outlives_sixteen_training_lengths_with_the_filter_alone(calibrated):
    model, tables = calibrated
    ids = text(LONG, torch.Generator().manual_seed(2))
    at_training_length, plain = influence(model, ids[:, :TRAINED]), influence(model, ids)
    with longmamba(model, tables, cutoff=0.05, shortest=128):
        filtered = influence(model, ids)
    assert plain < 0.01 * at_training_length
    assert filtered > 0.1 * at_training_length


@torch.no_grad()
def test_local_channels_short_texts_and_decoding_steps_stay_as_they_are(calibrated):
    model, tables = calibrated
    seen: dict[str, Tensor] = {}
    mixer = model.blocks[0].mixer
    with longmamba(model, tables, cutoff=0.05, shortest=128):
        change = mixer.step_filter
        delta = 0.1 * torch.rand(1, LONG, 4)
        changed = change(delta)
        assert torch.equal(changed[:, :, 2:], delta[:, :, 2:])
        assert (changed[:, :, :2] == 0).any()
        for n in (1, 127):
            assert torch.equal(change(delta[:, :n]), delta[:, :n])
        seen["inside"] = model(text(LONG, torch.Generator().manual_seed(3)))
    assert mixer.step_filter is None
    assert not torch.equal(model(text(LONG, torch.Generator().manual_seed(3))), seen["inside"])


@torch.no_grad()
@pytest.mark.parametrize("method", ["threshold", "share", "bound", "rank", "scale", "top", "top_tokens"])
def test_every_method_changes_the_global_channels_of_a_long_text_alone(calibrated, method: str):
    model, tables = calibrated
    delta = 0.1 * torch.rand(1, LONG, 4)
    with longmamba(model, tables, cutoff=0.05, shortest=128, method=method, k=100):
        changed = model.blocks[0].mixer.step_filter(delta)
    assert torch.equal(changed[:, :, 2:], delta[:, :, 2:])
    assert (changed[:, :, :2].sum(1) < 0.5 * delta[:, :, :2].sum(1)).all()


@torch.no_grad()
def test_at_a_cutoff_of_one_no_channel_is_global(calibrated):
    model, tables = calibrated
    ids = text(LONG, torch.Generator().manual_seed(4))
    plain = model(ids)
    with longmamba(model, tables, cutoff=1.0, shortest=128):
        assert torch.equal(model(ids), plain)


def test_the_nearest_calibrated_length_counts():
    assert [table().nearest(n) for n in (1, 90, 100, 5000)] == [32, 64, 128, 1024]


def test_bad_input_is_named(calibrated):
    model, tables = calibrated
    cases = [
        (dict(method="best"), tables, "method must be one of"),
        ({}, {}, "lack the layers"),
        ({}, {"blocks.0.mixer": table(3)}, "another model's"),
    ]
    for keywords, given, words in cases:
        with pytest.raises(ValueError, match=words), longmamba(model, given, cutoff=0.1, **keywords):
            pass
    with pytest.raises(ValueError, match="no Mamba"):
        calibrate(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="one at a time"):
        calibrate(model, [torch.zeros(2, 9, dtype=torch.long)])
    with pytest.raises(ValueError, match="at least one"):
        combine([])
    with pytest.raises(ValueError, match="how must be"):
        combine([table()], "median")
    with pytest.raises(ValueError, match="clamp must be"):
        calibration(steps(9)[0], -torch.ones(5), clamp=0.0)
    with pytest.raises(ValueError, match="must have shapes"):
        calibration(steps(9)[0], -torch.ones(4))


def test_the_largest_over_texts_is_kept_on_demand():
    tables = [table() for _ in range(3)]
    for how, over in (("mean", lambda t: t.mean(0)), ("max", lambda t: t.amax(0))):
        found = combine(tables, how)
        torch.testing.assert_close(found.decay, over(torch.stack([t.decay for t in tables])))
        torch.testing.assert_close(found.threshold[256], over(torch.stack([t.threshold[256] for t in tables])))


def test_mamba_layers_are_calibrated_too():
    model = MambaLM(vocabulary=40, dim=16, depth=2, states=4).eval()
    tables = calibrate(model, [torch.randint(40, (1, 30))], lengths=(30, 60))
    assert {t.decay.shape for t in tables.values()} == {(32,)}
    assert isinstance(make().blocks[0].mixer, Mamba2)
