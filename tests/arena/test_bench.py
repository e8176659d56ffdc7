"""The benchmarks of operators: right before they are timed, kept, resumed, shown and exported."""

import csv
import importlib.util
import io
import json

import pytest
from typer.testing import CliRunner

from attnlab.arena import bench, study
from attnlab.arena.bench import curve, longca, ops
from attnlab.arena.bench import scale as scale_bench
from attnlab.arena.bench.operators import OPERATORS, OURS
from attnlab.cli import app
from attnlab.patterns.training import STATIC, flops


def measured(name, **options):
    module = bench.find(name)
    return [module.measure(case, "cpu", lambda fraction: None) for case in module.cases("small", **options)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("attnlab.arena.measure._REPEAT_FOR", 0.0)


def test_every_mask_is_computed_right_by_ours_and_by_torchs_operator():
    records = measured("longca", lengths=[128], heads=2, head_dim=16, operators=[OURS, "sdpa"])
    assert len(records) == 2 * len(longca.MASKS)
    for record in records:
        (point,) = record["points"]
        assert record["status"] == "done"
        assert point["deviation"] < 1e-5
        assert point["forward"]["seconds"] > 0
        assert point["train"]["seconds"] > 0
    areas = {r["case"]["mask"]: r["points"][0]["area"] for r in records}
    assert areas["full"] == 128 * 128
    assert areas["causal"] == 128 * 129 // 2
    assert areas["block_sparse"] == 128 * 16  # one of eight blocks of 16 is seen


def test_every_operation_is_computed_right():
    records = measured("ops", lengths=[256], heads=2, head_dim=16)
    assert [r["case"]["operation"] for r in records] == list(ops.CASES)
    assert all(r["points"][0]["deviation"] < 1e-4 for r in records)


def test_a_wrong_operator_is_seen_to_be_wrong(monkeypatch):
    monkeypatch.setitem(OPERATORS, "sdpa", lambda *_: lambda q, k, v: v)
    (record,) = measured("longca", masks=["causal"], lengths=[64], heads=1, head_dim=8, operators=["sdpa"])
    assert record["points"][0]["deviation"] > 0.1


def test_a_rate_is_work_over_time():
    case = dict(mask="causal", operator=OURS, heads=2, head_dim=8)
    point = {"length": 64, "area": 100, "forward": {"seconds": 2.0, "memory": 2**21}, "train": {"seconds": 4.0}}
    record = {"benchmark": "longca", "mechanism": OURS, "case": case, "status": "done", "points": [point]}
    slower = {**record, "mechanism": "sdpa", "points": [{**point, "forward": {"seconds": 3.0, "memory": None}}]}
    forward, memory, train, _, speedup = longca.grids([record, slower])
    assert forward.columns == ["attnlab · 64", "sdpa · 64"]
    assert forward.rows == [("causal", [flops(100, 2, 8) / 2e9, flops(100, 2, 8) / 3e9])]
    assert forward.best_of(forward.rows[0][1]) == {0}
    assert memory.rows == [("causal", [2.0, None])]
    assert train.rows[0][1][0] == flops(100, 2, 8, backward=True) / 4e9
    assert speedup.rows == [("causal", [1.5])]


def test_what_an_operator_cannot_do_is_said_and_not_timed():
    if importlib.util.find_spec("natten") is None:
        pytest.skip("natten is not installed")
    (record,) = measured("longca", masks=["causal"], lengths=[64], operators=["natten"])
    assert record["points"][0]["reason"] == "natten computes neighborhoods"
    with pytest.raises(ValueError, match="masks: square unknown"):
        longca.cases(masks=["square"])
    with pytest.raises(ValueError, match="operators: cudnn unknown"):
        longca.cases(operators=["cudnn"])
    with pytest.raises(ValueError, match="only: cubes unknown"):
        ops.cases(only=["cubes"])
    with pytest.raises(ValueError, match="benchmark must be one of ops"):
        bench.find("opps")


def test_a_length_that_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setitem(curve.PATIENCE, "small", 1e-9)
    (record,) = measured("longca", masks=["causal"], lengths=[64, 128], operators=[OURS])
    first, second = record["points"]
    assert first["forward"]["seconds"]
    assert "would take about" in second["forward"]["reason"]


def test_a_case_is_found_again_by_what_it_depends_on():
    def keys(**options):
        return [job.key for job in study.plan_benchmark("longca", masks=["causal", "full"], **options).jobs]

    assert keys() == keys()
    assert not set(keys()) & set(keys(head_dim=32))
    assert len(set(keys(peers=True))) == 2 * len(OPERATORS)


def test_the_command_measures_resumes_reports_and_exports(tmp_path):
    line = ["bench", "longca", "--masks", "causal,full", "--lengths", "64,128", "--heads", "1", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, line)
    assert first.exit_code == 0, first.output
    assert "2 measurements" in first.output and "GFLOP/s" in first.output
    again = CliRunner().invoke(app, line)
    assert "2 of them done before" in again.output and "causal" in again.output
    page = (tmp_path / "report" / "index.html").read_text()
    assert "What does it cost?" in page and "attnlab · 128" in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report" / "measurements.csv").read_text())))
    assert [(r["mask"], r["length"]) for r in rows] == [(m, n) for m in ("causal", "full") for n in ("64", "128")]
    assert all(float(r["forward.seconds"]) > 0 for r in rows)
    assert len(json.loads((tmp_path / "report" / "results.json").read_text())["measurements"]) == 2
    wrong = CliRunner().invoke(app, [*line, "--budget", "tiny"])
    assert isinstance(wrong.exception, ValueError) and "budget" in str(wrong.exception)


def test_every_static_mask_has_its_place_in_the_benchmark():
    assert len(STATIC) >= 12 and len(longca.DYNAMIC) == 2
    assert [c["mask"] for c in longca.cases()] == list(longca.MASKS)


def test_a_case_of_ranks_counts_its_bytes_and_is_right():
    _, case = scale_bench.cases(masks=["causal"], methods=["allgather"], ranks=[2], lengths=[64], head_dim=8)
    record = scale_bench.measure(case, "cpu", lambda fraction: None)
    assert record["status"] == "done", record["reason"]
    (point,) = record["points"]
    forward = 32 * 2 * 4 * 8 * 4  # half the tokens' keys and values, of 4 heads of 8 float32, to the other rank
    assert point["sent"] == 3 * forward  # the backward sends them again, and their gradients
    assert point["deviation"] < 1e-5
    assert point["balance"] == pytest.approx(1.0, abs=0.02)


def test_which_ranks_there_are_is_planned_and_said():
    cases = scale_bench.cases(peers=True)
    assert {c["method"] for c in cases} == {*scale_bench.METHODS, scale_bench.ALONE, "torch context_parallel"}
    assert all((c["method"] == "lasp2") == (c["mask"] == "state") for c in cases if c["ranks"] > 1)
    assert not any(c["method"] in ("usp", "double ring") and c["ranks"] < 4 for c in cases)
    for wrong, said in (
        (dict(masks=["block_sparse"]), "masks"),
        (dict(methods=["rung"]), "methods"),
        (dict(ranks=[1]), "ranks"),
    ):
        with pytest.raises(ValueError, match=said):
            scale_bench.cases(**wrong)
    said = CliRunner().invoke(app, ["bench", "scale", "--plan", "--gpus", "64", "--length", "2M"])
    assert said.exit_code == 0 and "← chosen" in said.output


def test_two_plans_are_one_study():
    kernels = study.plan_benchmark("longca", masks=["causal"])
    both = kernels + study.plan_benchmark("scale", masks=["causal"], methods=["ring"], ranks=[2])
    assert [job.benchmark for job in both.jobs] == ["longca", "scale", "scale"]
    assert both.settings["mechanisms"] == [OURS, scale_bench.ALONE, "ring × 2"]


def test_a_case_whose_ranks_fail_is_a_failed_case(monkeypatch):
    case = scale_bench.cases(masks=["causal"], methods=["ring"], ranks=[2], lengths=[64])[1]
    monkeypatch.setattr(scale_bench, "_PATIENCE", 0.01)
    assert scale_bench.measure(case, "cpu", lambda fraction: None)["reason"] == "no end after 0 s"
    monkeypatch.setattr(scale_bench, "_PATIENCE", 60.0)
    record = scale_bench.measure({**case, "mask": "nonsense", "method": "one process"}, "cpu", lambda fraction: None)
    assert record["status"] == "failed" and "mask must be one of" in record["reason"]
