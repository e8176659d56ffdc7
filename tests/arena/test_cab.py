"""The benchmark as a command: what takes part in what, its indices, and that it resumes, reports and exports."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from attnlab import cards
from attnlab.arena import jobs, measure, study
from attnlab.arena.bench import cab
from attnlab.arena.bench.cab_index import METRICS, benefit_of_attention, compositional_index, scaled
from attnlab.arena.command import perform
from attnlab.arena.network import NONE
from attnlab.arena.store import Study
from attnlab.arena.summary import Row, Summary
from attnlab.arena.task import Budget, find_task, tasks
from attnlab.arena.tasks.cab.base import CabTask
from attnlab.cli import app


def trial(task, mechanism, seed=0, **metrics):
    score = next(iter(metrics.values()))
    details = {"metrics": {name.replace("_", "-"): value for name, value in metrics.items()}}
    return dict(task=task, mechanism=mechanism, seed=seed, status="done", reason="", score=score, details=details)


def summary_of(trials, budget="cab-tiny", sweeps=()):
    rows = {}
    for t in trials:
        rows.setdefault(t["task"], {}).setdefault(t["mechanism"], []).append(t)
    found = {task: [Row(task, name, ts) for name, ts in by.items()] for task, by in rows.items()}
    names = list(dict.fromkeys(t["mechanism"] for t in trials))
    settings = {"benchmark": "cab", "budget": budget, "mechanisms": names, "seeds": 1}
    about = Study(1, "", "", settings, {}, [], [], {})
    return Summary(about, found, list(sweeps), len(trials), len(trials))


def test_every_mechanism_enters_the_patterns_that_its_card_claims():
    plan = cab.plan("tiny", tasks=["cab-sr-ns", "cab-lm-cs", "cab-wth-s-nc", "cab-tts-cc"], seeds=2)
    entered = {(job.task, job.mechanism) for job in plan.trials}
    refused = {(task, name) for task, name, _ in plan.left_out}
    claims = {
        "cab-sr-ns": cards.NONCAUSAL_SELF, "cab-lm-cs": cards.CAUSAL_SELF,
        "cab-wth-s-nc": cards.NONCAUSAL_CROSS, "cab-tts-cc": cards.CAUSAL_CROSS,
    }  # fmt: skip
    for task, claim in claims.items():
        assert (task, NONE) in entered
        for name in plan.settings["mechanisms"][1:]:
            assert ((task, name) in entered) == cards.describe(name).claims(claim)
            assert ((task, name) in entered) != ((task, name) in refused)
    assert len(plan.trials) == 2 * len(entered)
    assert set(plan.settings["mechanisms"]) >= {"multihead", "sliding_window", "abc", "performer", "cosformer", "s4d"}
    assert {job.layout for job in plan.sweeps} == {"self", "causal"}


def test_patterns_and_tasks_are_chosen_by_name():
    plan = cab.plan("tiny", patterns=["nc"], mechanisms=["multihead"])
    assert plan.settings["tasks"] == ["cab-pcc-nc", "cab-etth1-m-nc", "cab-ecl-m-nc", "cab-wth-s-nc"]
    for options, message in (
        (dict(patterns=["xs"]), "patterns: xs unknown; there are ns, cs, nc, cc"),
        (dict(size="huge"), "size: 'huge' is not one of tiny, medium, paper"),
        (dict(size="paper"), r"give their folder with --data-dir"),
        (dict(tasks=["cab-etth2-m-nc"]), "cab-etth2-m-nc has no size cab-tiny"),
        (dict(tasks=["recall"]), "recall has no size cab-tiny"),
        (dict(tasks=["cab-lm-cs"], patterns=["nc"]), "none of cab-lm-cs belongs to nc"),
        (dict(data="/nowhere"), "is not a folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            cab.plan(**{"size": "tiny", **options})


def test_an_ordinary_study_has_none_of_it():
    names = {name for name, cls in tasks().items() if issubclass(cls, CabTask)}
    assert len(names) == 21
    chosen = study.plan(mechanisms=["multihead"], seeds=1)
    assert not names & set(chosen.settings["tasks"])
    assert not any(job.layout == "self" for job in chosen.sweeps)


def test_indices_are_of_the_runs_at_hand_without_the_control():
    lm = {"multihead": 4.0, "abc": 5.0, "s4d": 6.0, NONE: 100.0}
    (grid, benefit) = cab.tables(summary_of([trial("cab-lm-cs", name, perplexity=x) for name, x in lm.items()]))
    assert grid.columns == ["index", "LM"]
    assert dict(grid.rows)["multihead"] == pytest.approx([1.0, 1.0])  # (5 − 4) / 1
    assert dict(grid.rows)[NONE] == pytest.approx([-95.0, -95.0])
    assert [name for name, _ in grid.rows] == ["multihead", "abc", "s4d", NONE]  # the best first
    assert dict(benefit.rows)["causal self · LM"] == pytest.approx([96.0])


def test_seeds_are_averaged_and_a_method_without_a_task_has_no_index():
    trials = [
        trial("cab-lm-cs", name, s, perplexity=x) for s in (0, 1) for name, x in (("multihead", 4 + s), ("abc", 6))
    ]
    trials += [trial("cab-tts-cs", "multihead", MCD=2.0, MSD=1.0), trial("cab-tts-cs", "s4d", MCD=3.0, MSD=1.5)]
    scores = cab.collect(summary_of(trials))["causal_self"]
    assert scores["multihead"]["LM", "perplexity"] == 4.5
    assert scores["abc"]["TTS", "Transformer-TTS MCD"] is None
    grid = cab.tables(summary_of(trials))[0]
    assert dict(grid.rows)["abc"][0] is None
    assert dict(grid.rows)["multihead"][0] > 0


def test_at_its_published_size_the_published_scale_holds():
    """The authors' score of vanilla attention in language modelling gives their index."""
    trials = [trial("cab-lm-cs", name, perplexity=x) for name, x in (("multihead", 16.02), ("abc", 29.13))]
    trials += [trial("cab-etth1-m-nc", "multihead", MSE=1.0, MAE=0.7)]
    found = {
        g.title.split(",")[1].split("(")[0].strip(): g
        for g in cab.tables(summary_of(trials, "cab-paper"))
        if "index," in g.title
    }
    causal = dict(found["causal self"].rows)
    assert causal["multihead"] == pytest.approx([None, None, None, 0.751], abs=1e-3)
    assert found["causal self"].columns == ["index", "TTS", "Sum", "LM"]
    assert dict(found["noncausal cross"].rows)["multihead"] == [None, None, None]  # one of six parts of ETT


def test_benefit_is_in_deviations_between_methods():
    runs = {"a": {("LM", "perplexity"): 4.0}, "b": {("LM", "perplexity"): 6.0}}
    metrics = scaled(runs, {"perplexity": -1})
    assert benefit_of_attention(metrics, [4.0], [8.0]).total == pytest.approx(4 / 2**0.5)
    assert compositional_index(METRICS["causal_self"], [None] * 6).total is None


def test_efficiency_lengths_come_from_the_sweeps():
    def sweep(name, layout, cost):
        points = [dict(length=n, seconds=cost(n), memory=None) for n in (256, 512, 1024, 2048)]
        return dict(mechanism=name, layout=layout, points=points, status="done", reason="")

    sweeps = [
        sweep("multihead", "self", lambda n: n * n), sweep("abc", "self", lambda n: 1000.0 * n),
        sweep("multihead", "causal", lambda n: n * n), sweep("kda", "causal", lambda n: 3000.0 * n),
        sweep("abc", "causal", lambda n: 9000.0 * n),
    ]  # fmt: skip
    trials = [trial("cab-lm-cs", n, perplexity=x) for n, x in (("multihead", 4.0), ("abc", 5.0))]
    grid = cab.tables(summary_of(trials, sweeps=sweeps))[-1]
    rows = dict(grid.rows)
    assert rows["abc"][0] == pytest.approx(1000)  # where it is measured as by the authors, noncausal
    assert rows["kda (causal)"][0] == pytest.approx(3000)
    assert rows["abc"][1] is None


@pytest.fixture
def quick(monkeypatch):
    """A benchmark of two tasks that take a moment."""
    monkeypatch.setattr(measure, "_REPEAT_FOR", 0.0)
    monkeypatch.setitem(measure.LENGTHS, "cab-tiny", (32, 64, 128))
    for name, length in (("cab-lm-cs", 32), ("cab-mlm-ns", 32)):
        budget = Budget(parameters=30_000, depth=1, steps=3, batch=2, length=length, examples=4)
        monkeypatch.setitem(find_task(name).budgets, "cab-tiny", budget)
    jobs._loaded.cache_clear()
    yield
    jobs._loaded.cache_clear()


def test_it_trains_shows_exports_and_goes_on(quick, tmp_path, capsys):
    plan = cab.plan("tiny", tasks=["cab-lm-cs", "cab-mlm-ns"], mechanisms=["multihead", "linear", "abc"])
    perform(plan, tmp_path, workers=0)
    first = capsys.readouterr().out
    assert "8 trials and 6 cost sweeps" in first
    assert "compositional index, noncausal self" in first
    perform(plan, tmp_path, workers=0)
    assert "14 of them done before" in capsys.readouterr().out
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "Compositional index, causal self" in page
    assert "Sequence, noncausal" in page
    saved = json.loads((tmp_path / "report/results.json").read_text(encoding="utf-8"))
    titles = [grid["title"] for grid in saved["tables"]["cab"]]
    assert any(title.startswith("compositional index, causal self") for title in titles)
    assert any(title.startswith("benefit of attention") for title in titles)


@pytest.fixture
def peers(monkeypatch):
    """Registers the peers for one test."""
    cards.entries()
    monkeypatch.setattr(cards, "_entries", dict(cards._entries))
    monkeypatch.delitem(sys.modules, "attnlab_loaded_peers", raising=False)
    yield cab.plan("tiny", tasks=["cab-mlm-ns"], mechanisms=["multihead"], peers=True)
    sys.modules.pop("attnlab_loaded_peers", None)


def test_peers_take_part_where_installed_and_else_are_named(peers):
    names = {job.mechanism for job in peers.trials} | {name for _, name, _ in peers.left_out}
    assert names >= {"peer_torch", "peer_x_transformers", "peer_natten", "peer_fla"}
    assert all("is not installed" in why or "only looks back" in why for _, n, why in peers.left_out if "peer" in n)
    assert str(peers.load[-1]).endswith("peers.py")  # so that worker processes know them too
    assert "peer_torch" not in cab.MECHANISMS


def test_peers_are_causal_where_they_say_so(peers):
    for name in [n for n in peers.settings["mechanisms"] if n.startswith("peer") and n != "peer_fla"]:
        torch.manual_seed(0)
        module = cards.build(name, 32, causal=True, **cards.describe(name).sample).eval()
        x = torch.randn(2, 40, 32)
        changed = x.clone()
        changed[:, -1] = 0
        with torch.no_grad():
            torch.testing.assert_close(module(x)[:, :-1], module(changed)[:, :-1])
        if cards.describe(name).claims(cards.NONCAUSAL_CROSS):
            crossed = cards.build(name, 32, **cards.describe(name).sample)
            assert crossed(x, torch.randn(2, 7, 32)).shape == x.shape


def test_the_command_says_what_can_be_mended(tmp_path):
    for arguments, message in (
        (["--size", "paper"], r"give their folder with --data-dir"),
        (["--patterns", "ns,xy"], "patterns: xy unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, ["bench", "cab", *arguments, "--out", str(tmp_path)], catch_exceptions=False)


def test_a_benchmark_is_on_the_list():
    card = cards.describe("cab")
    assert (card.kind, card.paper) == (cards.BENCHMARK, "2210.07661")
