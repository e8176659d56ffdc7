import base64
import csv
import io
import json
import re
import shutil
import subprocess

import pytest
import torch

from attnlab.arena import charts, measure, report, study
from attnlab.arena.charts import Series, pareto
from attnlab.arena.influence import as_png, as_text, influence
from attnlab.arena.store import Store
from attnlab.arena.summary import summarise
from attnlab.arena.tables import show


@pytest.fixture
def summary(toys, tmp_path, monkeypatch):
    """A small study with one of everything: results, a divergence, a failure, mechanisms left out."""
    monkeypatch.setattr(measure, "LENGTHS", {"small": (64, 256)})
    monkeypatch.setattr(measure, "DECODE_AT", (8, 16))
    names = ["toy", "multihead", "toy_bad", "toy_broken", "toy_sees_all", "focal"]
    plan = study.plan(["sums"], names, seeds=2)
    with Store(tmp_path / "results.sqlite") as store:
        study.run(plan, store, workers=0, command='attnlab compare --tasks sums --data "my <b>text</b>.txt"')
        yield summarise(store)


def test_the_page_stands_alone_and_says_what_it_must(summary, tmp_path):
    page = report.write(summary, tmp_path / "report").read_text()
    assert not re.search(
        r"<script|<link(?! rel=\"icon\" href=\"data:)|@import|src=\"(?!data:)|href=\"(?!data:)|url\(", page
    )
    for wanted in ("sums", "multihead", "running means", "data:image/png", "diverged", "a toy that broke"):
        assert wanted in page
    assert "not causal" in page and "feature maps" in page  # who took no part, and why
    assert "my &lt;b&gt;text&lt;/b&gt;.txt" in page  # the exact command, as text
    assert summary.study.versions["torch"] in page
    assert page.count("<svg") >= 5
    assert "None" not in page and "nan" not in page.replace("nan at step", "")


def test_the_data_beside_the_page_are_complete(summary, tmp_path):
    report.write(summary, tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report" / "trials.csv").open()))
    assert len(rows) == 2 * 5
    toy = [row for row in rows if row["mechanism"] == "toy"]
    assert [float(row["score"]) for row in toy] == summary.row("sums", "toy").scores
    assert {row["status"] for row in rows} == {"done", "diverged", "failed"}
    points = list(csv.DictReader((tmp_path / "report" / "sweeps.csv").open()))
    assert [int(row["length"]) for row in points if row["mechanism"] == "multihead"] == [64, 256]
    everything = json.loads((tmp_path / "report" / "results.json").read_text())
    assert everything["study"]["command"] == summary.study.command
    assert everything["answers"]["sums"]["use"] == summary.answers["sums"].use


def test_a_report_that_exists_is_refused_and_replaced_only_by_force(summary, tmp_path):
    folder = tmp_path / "report"
    report.write(summary, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        report.write(summary, folder)
    (folder / "index.html").write_text("")
    report.write(summary, folder, force=True)
    assert report.is_ours(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_not_taken_for_a_report(tmp_path):
    (tmp_path / "index.html").write_text("<!doctype html><p>my own page")
    assert not report.is_ours(tmp_path)
    assert not report.is_ours(tmp_path / "none")


def test_a_study_without_results_still_has_a_report(toys, tmp_path):
    plan = study.plan(["sums"], ["toy"], seeds=1)
    with Store(tmp_path / "r.sqlite") as store:
        study.run(study.Plan([], [], [], plan.about, plan.settings), store, workers=0)
        page = report.write(summarise(store), tmp_path / "report").read_text()
    assert "no trial has finished yet" in page


def test_the_terminal_ends_with_what_to_use(summary):
    from rich.console import Console

    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))
    show(summary, console)
    text = console.export_text()
    assert "Which one should I use here?" in text
    assert text.strip().splitlines()[-1].strip().startswith("sums: use ")
    assert "not in it, and why" in text and "a toy that broke" in text
    assert re.search(r"multihead\s.*\s3,\d\d\d\s|multihead\s.*\s4,0\d\d\s", text)  # parameters, within 2 % of 4,000


def test_a_browser_opens_the_page_without_complaint(summary, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    page = report.write(summary, tmp_path / "report")
    shot = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.stat().st_size > 10_000
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (4.0, 2.0)]
    assert pareto(points, lower=True) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert pareto(points, lower=False) == [(1.0, 5.0)]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.001, 5e9], [-3.0, 4.0]])
def test_charts_draw_any_numbers_inside_their_frame(values):
    series = [Series(f"s{i}", i, [(abs(v) + 1, v), (abs(v) + 2, v)], spread=[0.1]) for i, v in enumerate(values)]
    for drawn in (
        charts.line_chart(series, "x", "y", log_x=True, log_y=True, marks=True),
        charts.front_chart(series, "x", "y", lower=True, baseline=("<none>", values[0])),
    ):
        at = [float(n) for n in re.findall(r'c[xy]="([-\d.]+)"', drawn)]
        assert at and all(0 <= n <= 380 for n in at)
        assert "nan" not in drawn and "<none>" not in drawn
    assert charts.line_chart([], "x", "y") == ""


def test_influence_shows_who_sees_whom():
    seen = influence("sliding_window", "causal", length=64) > 0
    i, j = torch.arange(64)[:, None], torch.arange(64)
    assert (seen == ((i - j < 16) | (j < 2)) & (j <= i)).all()  # the card's window of 16 and two sinks


def test_influence_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    influence("multihead", "causal", length=8)
    assert torch.equal(before, torch.get_rng_state())


def test_pictures_are_png_and_text():
    from matplotlib.image import imread

    strength = torch.eye(6)
    picture = imread(io.BytesIO(base64.b64decode(as_png(strength).split(",")[1])))
    assert picture.shape[:2] == (6, 6)
    assert (picture == 1 - strength.numpy()).all()
    assert as_text(strength).splitlines() == ["█     ", "  █   ", "    █ "]
