import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnlab.arena import study
from attnlab.arena.jobs import TRIAL, Job, load_files
from attnlab.arena.live import Forecast, clock
from attnlab.arena.network import NONE
from attnlab.arena.pool import Event, perform
from attnlab.arena.store import Store, StoreError

TOYS = Path(__file__).with_name("toys.py")


def finished(path):
    if not path.exists():
        return {}
    try:
        with Store(path) as store:
            return {(r["mechanism"], r["seed"]): key for key, r in store.results(kind=TRIAL).items()}
    except StoreError:  # opened before it was made
        return {}


def test_a_plan_lists_every_trial_and_every_reason(toys):
    plan = study.plan(["sums", "textures"], ["toy", "focal", "toy_sees_all"], seeds=2)
    trials = [(job.task, job.mechanism) for job in plan.trials if job.seed == 1]
    assert ("sums", "toy") in trials and ("textures", "focal") in trials and ("textures", NONE) in trials
    assert ("sums", "focal") not in trials and ("sums", "toy_sees_all") not in trials
    reasons = {(task, mechanism): reason for task, mechanism, reason in plan.left_out}
    assert "feature maps" in reasons["sums", "focal"]
    assert "not causal" in reasons["sums", "toy_sees_all"]
    assert len({job.key for job in plan.jobs}) == len(plan.jobs)
    assert [job.seed for job in plan.trials] == sorted(job.seed for job in plan.trials)


def test_the_same_request_has_the_same_keys_and_any_other_has_others(toys, monkeypatch):
    first, again, medium = (study.plan(["sums"], ["toy"], seeds=1, budget=b) for b in ("small", "small", "medium"))
    keys = [[job.key for job in plan.jobs] for plan in (first, again, medium)]
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])


def test_a_mechanism_whose_source_changed_runs_anew(toys, tmp_path, monkeypatch):
    from attnlab.arena import jobs

    before = [job.key for job in study.plan(["sums"], ["toy"], seeds=1).jobs]
    monkeypatch.setattr(jobs, "_contents", lambda path: Path(path).read_bytes() + b"\n" * path.endswith("toys.py"))
    assert not set(before) & {job.key for job in study.plan(["sums"], ["toy"], seeds=1).jobs}


@pytest.mark.parametrize(
    ("tasks", "mechanisms", "more", "message"),
    [
        (["txt"], [], {}, "no task is called 'txt'"),
        (["recall"], ["multihed"], {}, "did you mean 'multihead'"),
        (["recall"], ["focal"], {}, "none of them can do any"),
        (["recall"], [], {"seeds": 0}, "0 is not a number of seeds"),
        (["recall"], [], {"budget": "huge"}, "'huge' is not one of small, medium"),
        (["recall"], [], {"device": "tpu"}, "'tpu' is not here; cpu"),
        (["recall"], [], {"data": __file__}, "none of the tasks recall reads text; text would"),
    ],
)
def test_what_cannot_be_asked_is_said(tasks, mechanisms, more, message):
    with pytest.raises(ValueError, match=message):
        study.plan(tasks, mechanisms, **more)


def test_a_missing_package_is_an_error_only_for_what_was_asked_for(monkeypatch):
    from attnlab.arena.tasks import series

    def missing(*_):
        raise ImportError("pip install it")

    monkeypatch.setattr(series, "need", missing)
    series._statsmodels_series.cache_clear()
    with pytest.raises(ImportError, match="pip install it"):
        study.plan(["series"], ["multihead"])
    plan = study.plan([], ["multihead"], seeds=1)
    assert ["series", "all", "pip install it"] in plan.left_out
    assert "recall" in plan.settings["tasks"]


def test_results_are_kept_and_faults_are_results(toys, tmp_path):
    plan = study.plan(["sums"], ["toy", "toy_bad", "toy_broken"], seeds=1)
    with Store(tmp_path / "r.sqlite") as store:
        study.run(plan, store, workers=0)
        status = {r["mechanism"]: r["status"] for r in store.results(kind=TRIAL).values()}
        assert status == {NONE: "done", "toy": "done", "toy_bad": "diverged", "toy_broken": "failed"}
        again = [job.mechanism for job in study.missing(plan.trials, store)]
        assert again == ["toy_broken"]  # a failure is tried again, a divergence is not


def test_a_killed_study_loses_only_what_was_running_and_goes_on(toys, tmp_path):
    path = tmp_path / "r.sqlite"
    code = (
        "import sys\n"
        "from attnlab.arena import study\n"
        "from attnlab.arena.store import Store\n"
        "if __name__ == '__main__':\n"
        "    plan = study.plan(['sums'], ['toy_slow'], seeds=4, load=[sys.argv[1]])\n"
        "    with Store(sys.argv[2]) as store: study.run(plan, store, workers=1)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(TOYS), str(path)]
    running = subprocess.Popen(command, start_new_session=True)
    until = time.monotonic() + 90
    while len(before := finished(path)) < 3:
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = finished(path)
    while alive(running.pid):  # the worker notices that nobody listens
        assert time.monotonic() < until
        time.sleep(0.1)
    plan = study.plan(["sums"], ["toy_slow"], seeds=4)
    with Store(path) as store:
        kept = store.results()
        todo = study.missing(plan.jobs, store)
        assert len(todo) == len(plan.jobs) - len(before) > 0
        done = []
        study.run(plan, store, workers=0, watch=lambda event: done.append(event.job.key) if event.record else None)
        assert done == [job.key for job in todo]  # what was kept is not done again
        assert not study.missing(plan.jobs, store)
        assert all(store.results()[key] == record for key, record in kept.items())
        assert store.study().id == 1  # resumed, not begun anew


def alive(group: int) -> bool:
    """Whether a process of the group still runs (a zombie does not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def test_a_worker_that_is_killed_costs_one_job(toys):
    load = [str(TOYS)]
    jobs = study.plan(["sums"], ["toy_slow"], seeds=2).trials
    killed, records = [], {}
    for event in perform(jobs, workers=1, threads=1, load=load):
        if event.job.mechanism == "toy_slow" and not killed and event.record is None and event.fraction:
            (worker,) = children(os.getpid())
            killed.append(event.job.key)
            os.kill(worker, signal.SIGKILL)
        if event.record is not None:
            records[event.job.key] = event.record
    assert len(records) == len(jobs)
    assert records[killed[0]]["status"] == "failed"
    assert "SIGKILL" in records[killed[0]]["reason"]
    assert [r["status"] for key, r in records.items() if key not in killed] == ["done"] * (len(jobs) - 1)


def children(parent: int) -> list[int]:
    """Workers of ours: children that multiprocessing spawned."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_file_to_load_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_files([tmp_path / "none.py"])


def a_job(key, task="sums", mechanism="toy"):
    return Job(key, TRIAL, mechanism, "small", "cpu", task)


def test_the_remaining_time_is_that_of_like_jobs():
    jobs = [a_job("1"), a_job("2"), a_job("3", mechanism="other"), a_job("4", task="text")]
    forecast = Forecast(jobs, workers=2)
    forecast.note(Event(jobs[0]), now=0.0)
    forecast.note(Event(jobs[0], 1.0, {"seconds": 10.0}), now=90.0)  # most of which the worker took to start
    assert forecast.done == 1
    assert forecast.remaining() == pytest.approx(3 * 10 / 2)
    forecast.note(Event(jobs[2], 0.01), now=90.0)
    forecast.note(Event(jobs[2], 1.0, {}), now=120.0)
    assert forecast.expected(jobs[1]) == 10.0  # its own kind
    assert forecast.expected(jobs[3]) == 20.0  # nothing of its task: all
    forecast.note(Event(jobs[1], 0.5), now=125.0)
    assert forecast.remaining() == pytest.approx((5 + 20) / 2)
    assert 0 < forecast.share() < 1


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3725, "1:02:05")])
def test_times_read_as_on_a_clock(seconds, text):
    assert clock(seconds) == text


def test_data_of_the_users_choose_the_tasks_that_read_them(tmp_path):
    book = tmp_path / "book.txt"
    book.write_bytes(bytes(range(256)) * 400)
    plan = study.plan([], ["multihead"], data=book, seeds=1)
    assert plan.settings["tasks"] == ["text"]
    assert {job.data for job in plan.trials} == {str(book)}
    assert {job.key for job in plan.trials}.isdisjoint(
        job.key for job in study.plan(["text"], ["multihead"], seeds=1).trials
    )
    with pytest.raises(FileNotFoundError, match="does not exist"):
        study.plan([], data=tmp_path / "none")


def test_a_full_disk_stops_the_study_and_keeps_what_was_done(toys, tmp_path):
    plan = study.plan(["sums"], ["toy"], seeds=3)
    with Store(tmp_path / "r.sqlite") as store:
        done = []

        def watch(event):
            if event.record is not None:
                done.append(event.job.key)
                pages = store.connection.execute("pragma page_count").fetchone()[0]
                store.connection.execute(f"pragma max_page_count = {pages}")  # SQLite's own word for a full disk

        with pytest.raises(StoreError, match="the disk is full"):
            study.run(plan, store, workers=0, watch=watch)
        assert done == list(store.results()) and done
    with Store(tmp_path / "r.sqlite") as store:  # room again
        study.run(plan, store, workers=0)
        assert not study.missing(plan.jobs, store)
