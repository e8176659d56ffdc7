"""The benchmark's tasks: what they ask, that it can be answered, and how they are scored."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnlab.arena.bench import cab
from attnlab.arena.bench.cab_index import METRICS, PATTERNS
from attnlab.arena.network import Network, mixer
from attnlab.arena.task import CAUSAL, CAUSAL_CROSS, CROSS, SELF, find_task, tasks
from attnlab.arena.tasks.cab.base import PATTERN_OF
from attnlab.arena.tasks.cab.clouds import chamfer, farthest
from attnlab.arena.tasks.cab.faces import psnr, ssim
from attnlab.arena.tasks.cab.rouge import rouge
from attnlab.arena.tasks.cab.sound import Mel, distortions, filters, warped
from attnlab.arena.tasks.cab.summaries import words_of
from attnlab.arena.tasks.cab.vocabulary import END, PAD, Vocabulary

TINY = [cls.name for cls in cab.of_budget("cab-tiny")]


@pytest.fixture(scope="module")
def ready():
    return {name: find_task(name)("cab-tiny") for name in TINY}


def test_every_published_metric_has_its_tasks():
    wanted = {(p, m.task, m.name, m.sign) for p in PATTERNS for m in METRICS[p]}
    paper = cab.of_budget("cab-paper")
    here = {
        (PATTERN_OF[c.layout], c.about, c.prefix + name, sign) for c in paper for name, sign in c.signs.items()
    }  # fmt: skip
    assert here == wanted
    ett = [c for c in paper if c.prefix == "ETT "]
    assert len(ett) == 6  # three tables, each as a whole and its target alone


def test_every_pattern_has_tiny_tasks_and_small_studies_none():
    assert {PATTERN_OF[find_task(name).layout] for name in TINY} == set(PATTERNS)
    for cls in tasks().values():
        assert not (cls.name.startswith("cab-") and {"small", "medium"} & set(cls.budgets))


@pytest.mark.parametrize("name", TINY)
def test_batches_depend_on_the_generator_alone(ready, name):
    first, again, other = (ready[name].batch(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", TINY)
def test_the_network_fits_batch_and_loss_and_every_parameter_learns(ready, name):
    it = ready[name]
    torch.manual_seed(0)
    network = Network(it, "multihead", 32, 64)
    inputs, targets = it.batch(torch.Generator().manual_seed(0))
    tokens = network.stem(inputs)
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    assert tokens.shape == (it.budget.batch, it.budget.length, 32)
    with torch.no_grad():  # a head that starts at zero would hide the rest
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    it.loss(network(inputs), targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("name", [n for n in TINY if find_task(n).layout in (CAUSAL, CAUSAL_CROSS) and "tts" in n])
def test_frames_do_not_know_later_ones(ready, name):
    it = ready[name]
    network = Network(it, "multihead", 32, 64).eval()
    inputs, _ = it.batch(torch.Generator().manual_seed(0))
    changed = inputs.clone()
    changed[:, -1, it.each :] += 1.0  # the spectra before the last group
    assert torch.equal(network(inputs)[:, :-1], network(changed)[:, :-1])
    assert not torch.equal(network(inputs)[:, -1], network(changed)[:, -1])


@pytest.mark.parametrize("name", ["cab-sum-ns", "cab-sum-cs", "cab-sum-cc"])
def test_words_of_a_summary_do_not_know_later_ones_but_the_whole_source(ready, name):
    it = ready[name]
    network = Network(it, "multihead", 32, 64).eval()
    inputs, _ = it.batch(torch.Generator().manual_seed(0))
    later, source = inputs.clone(), inputs.clone()
    later[:, -1] = 5
    source[:, it.words_in - 1] = 5
    said = network(inputs)
    torch.testing.assert_close(network(later)[:, :-1], said[:, :-1])
    assert not torch.allclose(network(source)[:, 0], said[:, 0])


@pytest.mark.parametrize("name", ["cab-sum-ns", "cab-sum-cs", "cab-sum-cc"])
def test_who_writes_the_reference_scores_a_hundred(ready, name):
    it = ready[name]
    sources, targets = it._numbers(it.held_out)
    known = {tuple(source): target for source, target in zip(sources.tolist(), targets.long(), strict=True)}

    def predict(inputs):
        wanted = torch.stack([known[tuple(source)] for source in inputs[:, : it.words_in].tolist()])
        return F.one_hot(wanted, len(it.vocabulary))

    score = it.evaluate(predict)
    written = [it.vocabulary.text(target.tolist()) for target in targets]
    best = np.mean([rouge(ours, truth)[0] for ours, (_, truth) in zip(written, it.held_out, strict=True)])
    assert score.value == pytest.approx(best)
    assert score.value > 60  # a word that the vocabulary lacks cannot be written


def test_words_that_end_a_summary_are_the_last():
    vocabulary = Vocabulary([["b", "a", "a"], ["a", "b", "c"]], 6)
    assert vocabulary.numbers(["a", "c", "b"]) == [4, 1, 5]
    assert vocabulary.text([5, PAD, 4, END, 4]) == ["b", "a"]
    assert words_of("readAll_lines2(HTTPError)") == ["read", "all", "lines", "2", "http", "error"]


def test_rouge_is_what_its_definition_says():
    found, truth = "the cat sat on the mat".split(), "the cat lay on a mat today".split()
    # Shared: the, cat, on, mat of 6 and 7 words; "the cat" of 5 and 6 pairs; the cat on mat in order.
    assert rouge(found, truth) == pytest.approx((100 * 8 / 13, 100 * 2 / 11, 100 * 8 / 13))
    assert rouge("a a a".split(), "a b".split())[0] == pytest.approx(100 * 2 / 5)  # each as often as in both
    assert rouge("b a".split(), "a b".split()) == pytest.approx((100, 0, 50))
    assert rouge([], truth) == (0, 0, 0)
    assert rouge(truth, truth) == pytest.approx((100, 100, 100))


def test_masks_hide_what_is_asked(ready):
    it = ready["cab-mlm-ns"]
    inputs, targets = it.batch(torch.Generator().manual_seed(0))
    asked = targets >= 0
    assert asked.float().mean() == pytest.approx(0.15, abs=0.02)
    assert (inputs[asked] == it.symbols).float().mean() == pytest.approx(0.8, abs=0.08)
    assert (inputs[~asked] < it.symbols).all()


@pytest.mark.parametrize("name", ["cab-mlm-ns", "cab-lm-cs"])
def test_perplexity_without_knowing_is_the_number_of_symbols(ready, name):
    score = ready[name].evaluate(lambda inputs: torch.zeros(*inputs.shape, 256))
    assert score.value == pytest.approx(256, rel=1e-4)
    assert score.details == {"metrics": {"perplexity": score.value}}


def test_psnr_and_ssim_are_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = (torch.randint(256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    b = (0.7 * a + 0.3 * b).round()
    for i in range(2):
        x, y = a[i].permute(1, 2, 0).numpy(), b[i].permute(1, 2, 0).numpy()
        assert psnr(a, b)[i] == pytest.approx(metrics.peak_signal_noise_ratio(x, y, data_range=255))
        options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2)
        _, full = metrics.structural_similarity(x, y, full=True, **options)
        assert ssim(a, b)[i] == pytest.approx(full[5:-5, 5:-5].mean())


def test_faces_start_from_bicubic_and_patches_are_pixels(ready):
    it = ready["cab-sr-ns"]
    score = it.evaluate(lambda inputs: torch.zeros(len(inputs), it.budget.length, it.patch**2))
    assert score.value == pytest.approx(it.trivial()[1])
    images = torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(it._image(it._patches(images)), images)
    perfect = it.evaluate(lambda inputs: _missing(it, inputs))
    assert perfect.value > 60


def _missing(it, inputs):
    """What is missing of each of these enlarged images."""
    high, low = (x.float() / 255 for x in it.held_out)
    rows = [int((low - 0.5 - one).abs().flatten(1).sum(1).argmin()) for one in inputs]
    return it._patches(high[rows] - low[rows]) / 0.1


def test_chamfer_and_f_score_are_what_loops_say():
    g = torch.Generator().manual_seed(0)
    found, truth = torch.rand(2, 30, 3, generator=g).double() / 20, torch.rand(2, 40, 3, generator=g).double() / 20
    l1, l2, f = chamfer(found, truth)
    for b in range(2):
        there = [min(math.dist(x, y) for y in truth[b].tolist()) for x in found[b].tolist()]
        back = [min(math.dist(x, y) for x in found[b].tolist()) for y in truth[b].tolist()]
        assert l1[b] == pytest.approx((np.mean(there) + np.mean(back)) / 2, rel=1e-4)
        assert l2[b] == pytest.approx(np.mean(np.square(there)) + np.mean(np.square(back)), rel=1e-4)
        p, r = np.mean(np.array(there) < 0.01), np.mean(np.array(back) < 0.01)
        assert f[b] == pytest.approx(2 * p * r / (p + r))


def test_farthest_points_are_far_apart():
    line = torch.tensor([0.0, 1, 2, 3, 10])[None, :, None].expand(1, 5, 3)
    assert farthest(line, 3).tolist() == [[0, 4, 3]]


def test_bodies_are_seen_from_one_side(ready):
    it = ready["cab-pcc-nc"]
    parts, wholes = it.held_out
    assert parts.abs().max() <= 0.5 + 1e-6
    assert chamfer(parts, wholes)[0].mean() > 1.2 * chamfer(wholes[:, ::2], wholes[:, 1::2])[0].mean()


def test_warping_is_the_cheapest_path():
    costs = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0)).double()

    def least(cost, i, j):
        if i == j == 0:
            return cost[0][0]
        before = [least(cost, a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
        return cost[i][j] + min(before)

    assert warped(costs).tolist() == pytest.approx([least(c, 4, 5) for c in costs.tolist()])


def test_the_same_sound_is_not_distorted_and_a_later_start_little():
    waves = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 8000)
    assert distortions(waves, waves, 8000) == (0.0, 0.0)
    late = F.pad(waves, (800, 0))[:, :8000]
    mcd, msd = distortions(late, waves, 8000)
    assert 0 < msd < distortions(waves.flip(1), waves, 8000)[1]
    # Twice as loud: every log-mel energy is 2 log 2 more, and of the cepstrum the first coefficient alone differs.
    mcd, msd = distortions(2 * waves, waves, 8000)
    assert msd <= 2 * math.log(2) + 1e-3
    assert mcd < 2 * math.log(2) * math.sqrt(80 / 13) + 1e-3


def test_a_tone_lies_in_its_band_and_comes_back():
    mel = Mel(8000, 256, 100, 32)
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(8000) / 8000)[None]
    bands = filters(mel)
    assert mel.log(tone)[0].mean(0).argmax() == bands[:, 32].argmax()  # bin 32 of 129 is 1000 Hz
    again = mel.log(mel.sound(mel.log(tone)))[0, 5:-5]
    assert (again.argmax(1) == bands[:, 32].argmax()).all()


def test_the_true_spectra_are_not_distorted(ready):
    it = ready["cab-tts-ns"]
    score = it.evaluate(lambda phones: it._scaled(it.held_out.mels[: len(phones)]))
    assert score.value == pytest.approx(0, abs=1e-3)
    assert it.trivial()[1] > 1
    turns = ready["cab-tts-cs"]
    truth = turns._scaled(turns.held_out.mels).unflatten(1, (-1, turns.each)).flatten(2)
    assert turns.evaluate(lambda inputs: truth[: len(inputs)]).value == pytest.approx(0, abs=1e-3)


def test_forecasts_are_given_nothing_of_what_they_are_asked(ready):
    it = ready["cab-etth1-m-nc"]
    inputs, targets = it._windows(np.array([500]))
    assert (inputs[0, it.context :, :7] == 0).all()
    np.testing.assert_array_equal(targets[0], it.values[500:524])
    np.testing.assert_array_equal(inputs[0, : it.context, :7], it.values[452:500])
    assert it._origins().min() >= it.test_from
    np.testing.assert_allclose(it.values[: it.train_until].mean(0), 0, atol=1e-5)
    perfect = it.evaluate(lambda inputs: torch.zeros(len(inputs), 24, 7))
    assert perfect.value == pytest.approx(it.trivial()[1], rel=0.05)


def test_tokens_see_all_others_in_the_noncausal_layout():
    x = torch.randn(1, 8, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer("multihead", 32, SELF)(x)[0, 0].sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()


def test_contexts_may_be_longer_than_what_looks_into_them():
    across = mixer("multihead", 32, CROSS, context=5)
    x = torch.randn(1, 8, 32)
    assert (across(x)[:, :5] == 0).all()
    torch.testing.assert_close(across(x)[:, 5:], across.mechanism(x[:, 5:], x[:, :5]))
