"""A study on a cluster is the study on one machine, whoever dies on the way."""

import sys
from pathlib import Path

import pytest

from attnlab.arena import cluster, study
from attnlab.arena.jobs import TRIAL
from attnlab.arena.store import Store

TOYS = Path(__file__).with_name("toys.py")

# Two that kill the process they train in, where it is a worker of the cluster: one in the middle of its first trial and
# never again, the other always.
KILLERS = """
import os, signal, sys
from pathlib import Path
from attnlab.cards import register
from attnlab_loaded_toys import Toy, _card

class Killer(Toy):
    steps = 0

    def dies(self):
        return True

    def forward(self, x, *rest, **how):
        self.steps += 1
        if self.steps == 10 and "default_worker" in sys.argv[0] and self.dies():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, *rest, **how)

@register(_card("deadly"))
class Deadly(Killer):
    pass

@register(_card("mortal"))
class Mortal(Killer):
    def dies(self):
        try:
            Path({marker!r}).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
"""


def numbers(store):
    """What the trials came to, without how long they took."""
    timed = ("seconds", "tokens_per_second")
    return {
        key: {name: value for name, value in record.items() if name not in timed}
        for key, record in store.results(kind=TRIAL).items()
    }


def test_a_study_whose_worker_is_killed_ends_complete_and_equal_to_that_of_one_machine(toys, tmp_path):
    pytest.importorskip("ray")
    marker = tmp_path / "died"
    killers = tmp_path / "killers.py"
    killers.write_text(KILLERS.format(marker=str(marker)))
    plan = study.plan(["sums"], ["toy", "mortal", "deadly"], seeds=1, load=[TOYS, killers])
    trials = [job for job in plan.trials if job.mechanism != "deadly"]
    events = []
    plan.sweeps = []
    with Store(tmp_path / "cluster.sqlite") as store:
        study.run(plan, store, workers=2, ray="local", watch=events.append)
        spread = numbers(store)
        assert not study.missing(trials, store)
        (again,) = {r["status"] for r in store.results(kind=TRIAL).values() if r["mechanism"] == "deadly"}
        assert again == "failed"
    assert marker.exists()
    assert {e.job.key for e in events if e.record is None} == {job.key for job in plan.trials}
    plan.trials = trials
    with Store(tmp_path / "alone.sqlite") as store:
        study.run(plan, store, workers=0)
        alone = numbers(store)
    assert {key: spread[key] for key in alone} == alone
    sys.modules.pop("attnlab_loaded_killers", None)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"attnlab\[ray\]"):
        cluster.connect("local")


def test_an_address_where_no_cluster_is_says_so():
    pytest.importorskip("ray")
    with pytest.raises(ConnectionError, match=r"no cluster answers at '127.0.0.1:1'"):
        cluster.connect("127.0.0.1:1")
