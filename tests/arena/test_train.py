import pytest
import torch

from attnlab.arena import memory
from attnlab.arena.task import find_task
from attnlab.arena.train import learning_rate, run_trial


@pytest.fixture
def sums(toys):
    return find_task("sums")("small")


def test_a_trial_learns_and_says_what_it_cost(sums):
    trial = run_trial(sums, "toy", 0)
    assert trial.status == "done"
    assert trial.score < 0.5 * sums.trivial()[1]
    assert abs(trial.parameters / 4_000 - 1) <= 0.02
    assert trial.flops_per_token > trial.parameters  # two per weight, and biases need none
    assert trial.tokens_per_second > 0
    steps, losses = zip(*trial.curve, strict=True)
    assert steps[-1] == 30 and losses[-1] < losses[0]


def test_a_seed_decides_everything(sums):
    first, again, other = (run_trial(sums, "toy", seed) for seed in (1, 1, 2))
    assert first.score == again.score and first.curve == again.curve
    assert first.score != other.score


def test_a_loss_that_is_no_number_is_recorded_as_diverged(sums):
    trial = run_trial(sums, "toy_bad", 0)
    assert trial.status == "diverged"
    assert "nan at step 1 of 30" in trial.reason
    assert trial.score is None


def test_what_a_mechanism_raises_is_its_result(sums):
    trial = run_trial(sums, "toy_broken", 0)
    assert (trial.status, trial.reason) == ("failed", "ArithmeticError: a toy that broke")


def test_what_would_not_fit_is_refused_with_the_estimate(sums, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 200 * 2**20)
    trial = run_trial(sums, "toy_hungry", 0)
    assert trial.status == "refused"
    assert trial.reason.startswith("would need about ") and trial.reason.endswith("200 MiB are free")
    assert run_trial(sums, "toy", 0).status == "done"


def test_the_estimate_is_of_the_size_of_what_training_takes(sums):
    from attnlab.arena.network import Network

    network = Network(sums, "toy_hungry", 16, 16)
    batch = sums.batch(torch.Generator().manual_seed(0))
    estimate = memory.estimate(network, sums.loss, batch)
    taken = 4 * 2 * 2**26  # four examples, each keeping the ones and their exponentials, 64 MiB each
    assert taken <= estimate <= 2 * taken


def test_peak_memory_sees_what_a_call_takes():
    if memory.peak(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 63 * 2**20 <= memory.peak(lambda: torch.ones(2**24).sum(), "cpu") <= 80 * 2**20
    assert memory.peak(lambda: torch.ones(2**10).sum(), "cpu") < 2**20


def test_available_memory_is_between_nothing_and_the_machine():
    import os

    assert 2**20 < memory.available("cpu") <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_rate_rises_then_falls():
    rates = [learning_rate(step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.06
