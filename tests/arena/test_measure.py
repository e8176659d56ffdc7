import pytest
import torch

from attnlab.arena import measure
from attnlab.arena.measure import Point, run_sweep
from attnlab.arena.task import CAUSAL, GRID


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "LENGTHS", {"small": (64, 256, 1024)})
    monkeypatch.setattr(measure, "DECODE_AT", (8, 64))


def test_a_sweep_counts_measures_and_decodes(quick):
    sweep = run_sweep("multihead", CAUSAL)
    assert [point.length for point in sweep.points] == [64, 256, 1024]
    assert all(point.seconds > 0 for point in sweep.points)
    assert set(sweep.decode) == {8, 64}
    assert 1.0 < sweep.flops_growth <= 2.0  # the projections are linear, the scores quadratic
    assert sweep.growth is not None


def test_a_sweep_of_feature_maps_runs_on_a_grid(quick):
    sweep = run_sweep("focal", GRID)
    assert sweep.status == "done"
    assert sweep.flops_growth == pytest.approx(1.0, abs=0.05)
    assert sweep.decode == {}


def test_what_fails_is_recorded(quick, toys):
    sweep = run_sweep("toy_broken", CAUSAL)
    assert (sweep.status, sweep.reason) == ("failed", "ArithmeticError: a toy that broke")


def test_a_length_that_would_take_too_long_is_left_out():
    before = [Point(100, 1.0), Point(200, 4.0)]
    assert measure.too_much(before, 400, 2.0, patience=10.0, device="cpu") == "would take about 16 s a call"
    assert measure.too_much(before, 400, 2.0, patience=20.0, device="cpu") == ""
    assert measure.too_much(before, 400, 1.0, patience=10.0, device="cpu") == ""
    assert "left out" in measure.too_much([Point(200, reason="no")], 400, 2.0, patience=20.0, device="cpu")


def test_a_length_that_would_not_fit_is_refused_with_the_estimate(monkeypatch):
    monkeypatch.setattr("attnlab.arena.memory.available", lambda device: 2**30)
    before = [Point(100, 0.01, memory=2**28)]
    assert measure.too_much(before, 400, 2.0, 10.0, "cpu") == "would need about 4.0 GiB of memory, and 1.0 GiB are free"
    assert measure.too_much(before, 100, 2.0, 10.0, "cpu") == ""


def test_time_is_of_the_least_disturbed_call():
    import time

    naps = iter([0.05, 0.001, 0.05, 0.05])
    assert measure.seconds_of(lambda: time.sleep(next(naps)), "cpu") < 0.05
    assert torch.get_num_threads() == 1
