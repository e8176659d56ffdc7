"""The planner: the cheapest that can, remembered, explained, and refused where nothing fits."""

import dataclasses
import re

import pytest
import torch
from rich.console import Console

from attnlab import attend, compiling, explain, planner
from attnlab.attend import pose
from attnlab.backends import Backend
from attnlab.cost import Cost, available_bytes, machine
from attnlab.patterns import Causal, Explicit, Neighborhood, Window


def inputs(tokens=256, heads=2, dim=32, **keywords):
    return [torch.zeros(1, heads, tokens, dim, **keywords) for _ in range(3)]


class Counting:
    """A backend that predicts what it is told to and counts what it is asked."""

    def __init__(self, name: str, seconds: float, reason: str = "", memory: float = 0.0):
        self.name, self.seconds, self.reason, self.memory = name, seconds, reason, memory
        self.asked = self.runs = 0

    def unsupported(self, problem):
        return self.reason

    def cost(self, problem):
        self.asked += 1
        return Cost(1.0, 1.0, self.seconds, self.memory)

    def run(self, problem, q, k, v):
        self.runs += 1
        return v, None


@pytest.fixture
def backends(monkeypatch):
    def use(*given: Backend):
        monkeypatch.setattr(planner, "BACKENDS", {b.name: b for b in given})
        monkeypatch.setattr(planner, "_chosen", {})
        return given

    return use


def test_the_cheapest_that_can_is_chosen_and_asked_about_once_per_problem(backends):
    slow, fast, unable = backends(Counting("slow", 2.0), Counting("fast", 1.0), Counting("unable", 0.1, "no"))
    for _ in range(3):
        attend(*inputs(), pattern=Window(4))
    assert (slow.runs, fast.runs, unable.runs) == (0, 3, 0)
    assert (slow.asked, fast.asked, unable.asked) == (1, 1, 0)
    attend(*inputs(), pattern=Window(5))
    attend(*inputs(257), pattern=Window(5))
    assert fast.asked == 3


def test_a_backend_that_is_named_is_taken_whatever_it_costs(backends):
    slow, fast = backends(Counting("slow", 2.0), Counting("fast", 1.0))
    attend(*inputs(), pattern=Window(4), backend="slow")
    assert (slow.runs, fast.runs) == (1, 0)


def test_what_needs_more_memory_than_is_free_is_not_chosen_and_refused_where_nothing_else_can(backends):
    big, small = backends(Counting("big", 1.0, memory=1e18), Counting("small", 2.0))
    attend(*inputs(), pattern=Window(4))
    assert (big.runs, small.runs) == (0, 1)
    assert "needs more than the" in str(explain(*inputs(), pattern=Window(4)))
    backends(big)
    with pytest.raises(MemoryError, match=r"Window\(size=4, .* needs about 888 PiB on the only backends .*\(big\)"):
        attend(*inputs(), pattern=Window(4))
    assert explain(*inputs(), pattern=Window(4)).choice == ""


def test_dense_attention_of_a_quarter_of_a_million_tokens_is_not_tried():
    q, k, v = (torch.zeros(1, 1, 1, 8).expand(1, 1, 2**18, 8) for _ in range(3))
    rows = {r.name: r for r in explain(q, k, v, pattern=Window(64)).rows}
    assert rows["dense"].cost.memory > 2**36
    assert explain(q, k, v, pattern=Window(64)).choice == "tiles"


@pytest.mark.parametrize(
    ("pattern", "tokens", "choice"),
    [
        (None, 64, "dense"),
        (Causal(), 512, "dense"),
        (Window(16), 4096, "tiles"),
        (Neighborhood((64, 64), 7), 4096, "tiles"),
    ],
    ids=str,
)
def test_dense_where_most_is_seen_and_tiles_where_little_is(pattern, tokens, choice):
    assert explain(*inputs(tokens), pattern=pattern).choice == choice


def test_predictions_grow_as_the_work_does():
    def predicted(name, tokens, **keywords):
        return next(r.cost for r in explain(*inputs(tokens, **keywords), pattern=Window(64)).rows if r.name == name)

    assert predicted("dense", 4096).flops == 4 * predicted("dense", 2048).flops
    assert predicted("tiles", 8192).flops < 2.2 * predicted("tiles", 4096).flops
    assert predicted("tiles", 4096).memory < predicted("dense", 4096).memory
    assert predicted("dense", 1024, requires_grad=True).seconds > 2 * predicted("dense", 1024).seconds


def test_problems_that_cost_differently_are_not_mixed_up():
    q, k, v = inputs()
    asked = [
        {},
        {"pattern": Window(4)},
        {"pattern": Window(5)},
        {"return_lse": True},
        {"dropout": 0.1},
        {"bias": q[0, :, :1, :1]},
        {"bias": torch.zeros(256, 256)},
        {"bias": lambda b, h, q, k: q * 1.0},
        {"weighting": "sigmoid"},
    ]
    keys = [pose(q, k, v, **keywords).key for keywords in asked]
    keys.append(pose(q.requires_grad_(), k, v).key)
    keys.append(pose(q.double(), k.double(), v.double()).key)
    with compiling():
        keys.append(pose(q, k, v).key)
    assert len(set(keys)) == len(keys)
    assert pose(q, k, v, scale=1.0).key == pose(q, k, v, scale=2.0).key


def test_equal_patterns_share_a_plan_and_masks_are_told_apart():
    q, k, v = inputs(8)
    mask = torch.ones(8, 8, dtype=torch.bool)
    assert pose(q, k, v, pattern=Window(4)).key == pose(q, k, v, pattern=Window(4)).key
    assert pose(q, k, v, pattern=Explicit(mask)).key != pose(q, k, v, pattern=Explicit(mask.tril())).key


def test_the_explanation_is_a_table_with_a_reason_or_numbers_for_every_backend():
    found = explain(*inputs(1024), pattern=Window(64))
    lines = str(found).splitlines()
    assert lines[0].startswith(
        "Window(size=64, causal=True) on B 1, H 2, Nq 1024, Nk 1024, D 32: float32, cpu, inference"
    )
    assert set(lines[1].split()) == {"backend", "FLOPs", "bytes", "memory", "time"}
    for line, (name, backend) in zip(lines[2:], planner.BACKENDS.items(), strict=False):
        reason = backend.unsupported(found.problem)
        assert line.startswith(name) and (line.endswith(reason) if reason else re.search(r"\d (ms|µs|s)", line))
    assert sum("← chosen" in line for line in lines) == 1
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(found)
    assert "← chosen" in console.export_text()


def test_compiling_is_offered_and_only_done_when_asked_for():
    q, k, v = inputs(4096)
    rows = {r.name: r for r in explain(q, k, v, pattern=Window(64)).rows}
    assert rows["flex"].cost is None and "opt in with attnlab.compiling()" in rows["flex"].reason
    assert "compiled, flex is predicted to take" in str(explain(q, k, v, pattern=Window(64)))
    with compiling():
        assert next(r for r in explain(q, k, v, pattern=Window(64)).rows if r.name == "flex").cost is not None
        with compiling(False):
            assert not planner.may_compile(q.device)
        assert planner.may_compile(q.device)
    assert not planner.may_compile(q.device)
    # It would compile for nothing where there is a gradient: no offer.
    trained = explain(q.requires_grad_(), k, v, pattern=Window(64))
    assert "no gradient on the CPU" in str(trained) and not trained.gain()


def test_the_offer_says_by_how_much(backends):
    backends(Counting("slow", 2.0), OnlyCompiled("flex", 0.5))
    assert (
        explain(*inputs()).gain()
        == "compiled, flex is predicted to take 500 ms, 4.0× faster: opt in with attnlab.compiling()"
    )
    backends(Counting("slow", 2.0), OnlyCompiled("flex", 3.0))
    assert explain(*inputs()).gain() == "compiled, flex is predicted to take 3 s: compiling would gain nothing"


class OnlyCompiled(Counting):
    def unsupported(self, problem):
        return "" if problem.may_compile else "it compiles"


def test_a_compiler_that_gives_up_makes_room_for_the_next_best(backends):
    class GivesUp(Counting):
        def run(self, problem, q, k, v):
            self.reason = "failed to compile"
            raise planner.FlexFailed(self.reason)

    _, next_best = backends(GivesUp("flex", 1.0), Counting("next", 2.0))
    attend(*inputs(), pattern=Window(4))
    assert next_best.runs == 1 and "failed to compile" in str(explain(*inputs(), pattern=Window(4)))
    backends(GivesUp("flex", 1.0), next_best)
    with pytest.raises(planner.FlexFailed):
        attend(*inputs(), pattern=Window(4), backend="flex")


def test_inside_torch_compile_only_what_can_be_traced_is_chosen():
    problem = dataclasses.replace(pose(*inputs(), pattern=Window(4)), traced=True, may_compile=True)
    assert planner.choose(problem).name == "dense"


def test_the_cache_is_bounded(backends, monkeypatch):
    backends(Counting("only", 1.0))
    monkeypatch.setattr(planner, "_LIMIT", 8)
    for size in range(1, 30):
        attend(*inputs(8), pattern=Window(size))
    assert len(planner._chosen) <= 8


def test_speeds_scale_with_threads_and_memory_is_known():
    assert available_bytes(torch.device("cpu")) > 2**20
    assert machine(torch.device("cpu")).kernels["fused"].flops > 0
