"""The numbers of CAB equal the authors': their script's on their example, their leaderboard's, their cost table's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnlab.arena.bench.cab_index import (
    LENGTHS,
    METRICS,
    PATTERNS,
    PUBLISHED,
    Metric,
    benefit_of_attention,
    compositional_index,
    correlations,
    efficiency_length,
    read_scores,
    scaled,
)
from attnlab.cards import build, describe
from attnlab.cost import count_flops

GOLDEN = Path(__file__).parents[1] / "goldens" / "cab" / "compositional_index.safetensors"


def test_the_constants_and_the_example_are_the_authors() -> None:
    case = load_file(GOLDEN)
    printed = (
        {"TTS": -0.3007, "Sum": -0.2491, "SR": -0.0766, "MLM": 0.5276},
        {"TTS": -0.0474, "Sum": 0.7838, "LM": 14.7311},
        {"PCC": 0.4495, "LSTF": 0.7442},
        {"TTS": 1.0473, "Sum": 0.8665},
    )
    for i, pattern in enumerate(PATTERNS):
        metrics = METRICS[pattern]
        for name, values in (
            ("mu", [m.mean for m in metrics]),
            ("sigma", [m.deviation for m in metrics]),
            ("sign", [m.sign for m in metrics]),
        ):
            assert values == pytest.approx(case[f"in.{name}{i}"].tolist(), rel=1e-7)
        found = compositional_index(metrics, case[f"in.raw{i}"].tolist())
        assert found.tasks == {task: pytest.approx(z, abs=5.1e-5) for task, z in printed[i].items()}
        assert found.total == pytest.approx(case["out.total"][i].item(), abs=5.1e-5)


def test_a_missing_score_leaves_a_hole_and_is_no_bonus() -> None:
    """As a number, the authors' -100 for a perplexity would be the best of all: 14.7 deviations."""
    lines = ["3 2 4 2 35 7 32 23 0.7 30", "4 2 33 6 30 -100", "7 0.2 0.8 1 0.8 0.5 0.5 0.6 0.6", "5 2.6 31 5 29"]
    scores = read_scores("\n".join(lines))
    found = compositional_index(METRICS["causal_self"], scores["causal_self"])
    assert found.tasks["LM"] is None and found.total is None and found.metrics[-1] is None
    assert found.tasks["TTS"] == pytest.approx(((4.08325 - 4) / 0.04529 + (2.20085 - 2) / 0.01372) / 2)
    assert compositional_index(METRICS["causal_cross"], scores["causal_cross"]).total is not None


def test_the_leaderboard_is_centred_on_the_methods_that_the_constants_are_of() -> None:
    """Where all ten are there, their indices add up to nothing; FlashAttention came later."""
    table = PUBLISHED["noncausal_self"]
    for task in (0, 2, 3):
        assert sum(row[task] or 0.0 for name, row in table.items() if name != "FlashAttention") == pytest.approx(
            0, abs=3e-3
        )
    perplexities = [row[3] for name, row in table.items() if name != "FlashAttention"]
    assert sum(z * z for z in perplexities if z is not None) == pytest.approx(len(perplexities) - 1, abs=0.01)


def test_scaling_by_the_runs_at_hand_centres_them_and_gives_them_unit_deviation() -> None:
    runs = {
        "a": {("copy", "accuracy"): 0.5, ("text", "loss"): 3.0, ("text", "same"): 1.0},
        "b": {("copy", "accuracy"): 0.9, ("text", "loss"): 2.0, ("text", "same"): 1.0},
        "c": {("copy", "accuracy"): 1.0, ("text", "loss"): None, ("text", "same"): 1.0},
    }
    metrics = scaled(runs, {"accuracy": 1, "loss": -1, "same": 1})
    assert [m.name for m in metrics] == ["accuracy", "loss"]
    keys = [(m.task, m.name) for m in metrics]
    found = {method: compositional_index(metrics, [scores[key] for key in keys]) for method, scores in runs.items()}
    accuracy = [index.metrics[0] for index in found.values()]
    assert sum(accuracy) == pytest.approx(0) and sum(z * z for z in accuracy) == pytest.approx(2)
    assert found["b"].tasks["text"] == pytest.approx(math.sqrt(0.5)) and found["c"].total is None


def test_efficiency_lengths_of_the_authors_costs_are_the_published_ones() -> None:
    """Their cost table of vanilla and ABC (ms, MiB): 1877 and 70 on the leaderboard."""
    vanilla, abc = (0.472, 0.628, 0.721, 0.981, 3.67, 18.437), (0.648, 0.59, 0.602, 0.91, 1.006, 1.509)
    found = efficiency_length(LENGTHS, vanilla, abc, skip=1)
    assert round(found.length) == 1877
    memory = efficiency_length(LENGTHS, (81, 265, 952, 3604, 14020, 55300), (42, 80, 156, 308, 612, 1220))
    assert round(memory.length) == 70
    assert memory.vanilla_fit > 0.9999 and memory.efficient_fit > 0.9999 > found.efficient_fit


def test_the_efficiency_length_is_where_exact_curves_cross() -> None:
    n = (1, 2, 3, 4)
    found = efficiency_length(n, [2 * x * x + 1 for x in n], [3 * x + 10 for x in n])
    assert found.length == pytest.approx(3)  # 2·9 + 1 = 3·3 + 10
    assert found.vanilla == pytest.approx((2, 0, 1)) and found.efficient == pytest.approx((3, 10))
    assert efficiency_length(n, [x * x + 9 for x in n], [0.1 * x for x in n]).length == 0
    assert efficiency_length(n, [9 * x - x * x for x in n], [20 + x for x in n]).length is None


def test_benefit_of_attention_is_a_difference_in_deviations() -> None:
    metrics = (Metric("a", "loss", 3.0, 0.5, -1), Metric("b", "accuracy", 0.5, 0.1))
    found = benefit_of_attention(metrics, (2.0, 0.4), (3.0, 0.5))
    assert found.tasks == {"a": pytest.approx(2.0), "b": pytest.approx(-1.0)} and found.total == pytest.approx(0.5)


def test_correlations_are_pearsons_over_shared_methods() -> None:
    first = {"x": 1.0, "y": 2.0, "z": 4.0, "only": 9.0}
    found = correlations(
        {
            "p": first,
            "q": {"x": 2.0, "y": 4.0, "z": 8.0},
            "r": {"x": -1.0, "y": None, "z": -2.0},
            "s": dict.fromkeys("xyz", 1.0),
        }
    )
    assert found["p", "q"] == pytest.approx(1.0)
    assert found["p", "r"] is None and found["p", "s"] is None  # two methods always lie on a line
    low = correlations({"p": first, "q": {"x": 1.0, "y": 1.0, "z": 0.0}})
    assert low["p", "q"] == pytest.approx(-5 / math.sqrt(28))  # by hand: −5/3 / √(14/3 · 2/3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compositional_index(METRICS["causal_cross"], [1.0]), "scores must be 5"),
        (lambda: read_scores("1 2 3"), "line for each"),
        (lambda: read_scores("1\n2\n3\n4"), "10 numbers for noncausal_self"),
        (lambda: efficiency_length([1, 2, 3], [1, 2], [1, 2, 3]), "equally long"),
        (lambda: efficiency_length([1, 2], [1, 2], [1, 2]), "at least 3"),
        (lambda: efficiency_length([1, 2, 3], [1, 2, math.nan], [1, 2, 3]), "finite"),
        (lambda: scaled({"a": {("t", "m"): 1.0}}, {}), "signs"),
    ],
)
def test_what_does_not_fit_is_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["abc", "nystrom", "performer", "lara", "cosformer", "s4d", "transformer_ls"])
def test_in_counted_work_the_methods_are_lines_that_vanilla_crosses(name: str) -> None:
    lengths = (128, 256, 512, 1024)

    def work(mechanism: str) -> list[float]:
        module = build(mechanism, 32, **dict(describe(mechanism).sample)).eval()
        with torch.no_grad():
            return [count_flops(module, torch.randn(1, n, 32)) for n in lengths]

    found = efficiency_length(lengths, work("multihead"), work(name))
    assert found.vanilla_fit > 1 - 1e-9 and found.efficient_fit > 0.999
    assert found.length is not None and found.length < 1024
