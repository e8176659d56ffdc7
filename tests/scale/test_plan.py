"""Predictions: exact where they count, right in order where they are compared with what was published or measured."""

import pytest
import torch

from attnlab import scale
from attnlab.scale import Layout, simulate
from attnlab.scale.plan import Machine, Model, Run, Work, fit, plan, published, softmax_layer

SMALL = Model(dim=32, depth=1, heads=4, kv_heads=2)
CLUSTER = Machine("toy", 1e12, 1e9, 1e8, 1e-5, 1e9, node=2)


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_bytes_of_the_formulas_are_those_that_are_sent(method: str, causal: bool) -> None:
    n, ranks = 256, 4
    layout = Layout.zigzag(n, ranks)

    def rank(wire):
        q = torch.randn(2, 4, n // ranks, 8, requires_grad=True)
        k, v = torch.randn(2, 2, 2, n // ranks, 8, requires_grad=True)
        pattern = scale_pattern if causal else None
        scale.attend(q, k, v, mesh=wire, method=method, layout=layout, pattern=pattern).sum().backward()
        return wire.traffic.sent

    from attnlab.patterns import Causal

    scale_pattern = Causal()
    sent = simulate(ranks, rank)
    share = 0.5 if causal else 1.0
    works = softmax_layer(method, ranks, n, 2, SMALL, CLUSTER, share=share, width=4)
    predicted = sum(w.sent for w in works)
    assert sum(sent) / ranks == pytest.approx(predicted, rel=1e-9)


def test_lasp2_is_the_way_for_states_and_its_bytes_do_not_grow() -> None:
    short, long = plan(64, "512K", linear=1.0), plan(64, "2M", linear=1.0)
    assert short.choice == long.choice == "lasp2"
    assert short.of("lasp2").sent == long.of("lasp2").sent
    assert "lasp2" in long.why and str(long).count("\n") >= 5


def test_what_was_published_comes_out_in_its_order_and_within_a_factor_of_two() -> None:
    found = published()
    for name, (predicted, said) in found.items():
        assert 0.5 * said < predicted < 2 * said, (name, predicted, said)
    assert found["lasp"][0] < found["ring of states"][0]


def test_hybrids_of_ring_and_all_to_all_lead_on_96_gpus() -> None:
    found = plan(96, "512K", heads=48, kv_heads=8, dim=6144)
    assert found.choice == "usp"
    assert "do not divide" in found.of("ulysses").reason
    assert found.of("usp").exposed < found.of("ring").exposed < found.of("allgather").exposed


def test_memory_for_activations_falls_as_one_over_the_gpus() -> None:
    def activations(gpus: int) -> float:
        model = Model(linear=1.0)
        weights = 16.0 * model.params / gpus + 4 * model.layer_params
        states = 4.0 * model.heads * model.head_dim**2 * gpus
        return plan(gpus, "1M", model=model).of("lasp2").memory - weights - states

    assert activations(16) == pytest.approx(4 * activations(64))


def test_a_machine_is_found_again_from_its_runs() -> None:
    runs = [
        Run(work, work.seconds(CLUSTER))
        for work in (Work(1e9, 1e6, 2), Work(5e9, 1e5, 40), Work(1e8, 5e7, 3), Work(2e10, 0, 0), Work(0, 1e6, 100))
    ]
    found = fit(runs)
    assert (found.rate, found.inside, found.latency) == pytest.approx((1e12, 1e9, 1e-5), rel=1e-6)
    assert fit([Run(Work(1e9 * i), 1e-3 * i) for i in (1, 2, 3)]).latency == 0.0


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(ValueError, match="length must be a number of tokens"):
        plan(64, "2 miles")
    with pytest.raises(ValueError, match="gpus"):
        plan(64, 32)
    with pytest.raises(ValueError, match="machine must be one of a100"):
        plan(machine="abacus")
    with pytest.raises(ValueError, match="linear"):
        plan(linear=2)
    assert "nothing fits" in plan(1, "2M").why
