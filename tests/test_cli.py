import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnlab import cards
from attnlab.cli import app, main, parse_pattern
from attnlab.patterns import Causal, Sinks, Window

TOYS = Path(__file__).parent / "arena" / "toys.py"
runner = CliRunner()


def run(*arguments):
    result = runner.invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_list_names_everything_once():
    output = run("list").output
    for name in cards.names():
        assert name in output


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--family", "linear"), lambda card: card.family == "linear"),
        (("--kind", "features"), lambda card: card.kind.value == "features"),
        (("--capability", "streaming"), lambda card: card.claims(cards.STREAMING)),
        (
            ("--capability", "streaming", "--capability", "noncausal-cross"),
            lambda card: card.claims(cards.STREAMING, cards.NONCAUSAL_CROSS),
        ),
        (("--cost", "linear"), lambda card: card.growth is not None and card.growth <= 1.15),
        (("--cost", "N²"), lambda card: card.cost == "N²"),
        (("--kind", "tokens", "--cost", "quadratic"), lambda c: c.kind is cards.TOKENS and (c.growth or 0) >= 1.9),
    ],
)
def test_list_filters(arguments, wanted):
    found = [card["name"] for card in json.loads(run("list", "--json", *arguments).output)]
    assert found == [entry.card.name for entry in cards.entries() if wanted(entry.card)]
    assert found


def test_list_as_json_holds_the_whole_card():
    found = {card["name"]: card for card in json.loads(run("list", "--json").output)}
    assert found["multihead"]["paper"] == "1706.03762"
    assert "streaming" in found["multihead"]["capabilities"]
    assert found["multihead"]["state"] == "2 * kv_heads * head_dim * N"
    assert found["focalnet"]["sizes"] == {n: s.params for n, s in cards.describe("focalnet").sizes.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family", "liner"), "did you mean 'linear'"),
        (("--capability", "streamin"), "did you mean 'streaming'"),
        (("--kind", "zzz"), "known: backbone"),
    ],
)
def test_list_knows_what_can_be_asked(arguments, message):
    with pytest.raises(ValueError, match=message):
        run("list", *arguments)


def test_show_says_equation_shapes_cost_paper_and_pattern():
    output = run("show", "sliding_window").output
    for wanted in ("query i sees key j", "(B, N, C)", "N (w + s)", "arxiv.org/abs/2309.17453", "streaming", "█",
                   "2·kv_heads·head_dim·(window + sinks) numbers of N tokens"):  # fmt: skip
        assert wanted in output
    drawing = [line for line in output.splitlines() if line.startswith("█")]
    assert len(drawing) == 32 and drawing[0].strip() == "█"  # causal: the first token sees itself


@pytest.mark.parametrize("name", [*cards.names(kind="tokens"), *cards.names(kind="features")])
def test_every_mechanism_can_be_shown_with_its_picture(name):
    assert "█" in run("show", name).output


def test_show_lists_the_sizes_of_a_network():
    output = run("show", "focalnet").output
    for name, size in cards.describe("focalnet").sizes.items():
        assert name in output and f"{size.params:,}" in output


def test_show_says_what_a_language_model_of_each_size_keeps_of_a_text():
    output = run("show", "llama").output
    assert "Σ layers numbers of N tokens" in output
    # Keys and values: 2 · 32 layers · 8 heads · 128, for the 8,192 tokens that it reads.
    assert "8,030,261,248 parameters, keeps 536,870,912 numbers of 8,192 tokens" in output


def test_show_of_an_unknown_name_asks_what_was_meant(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attnlab", "show", "multihed"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("attnlab: unknown name 'multihed'; did you mean 'multihead'") and "Traceback" not in error


def test_patterns_are_read_as_they_are_written():
    assert parse_pattern("Window(256) | Sinks(4) & Causal()") == Window(256) | Sinks(4) & Causal()
    assert parse_pattern("~Window(size=3, causal=False)") == ~Window(3, causal=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Windw(3)", "did you mean 'Window'"),
        ("__import__('os').getcwd()", "is not a pattern"),
        ("Window(3) +", "cannot be read"),
        ("Window(open('x'))", "malformed"),
        ("3", "is not a pattern"),
    ],
)
def test_only_patterns_are_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


def test_explain_prints_the_choice():
    output = run("explain", "Window(64)", "--length", "512", "--heads", "2").output
    assert "reference" in output and "chosen" in output


def test_compare_runs_resumes_and_reports(tmp_path):
    command = [sys.executable, "-m", "attnlab.cli", "compare", "--load", str(TOYS), "--tasks", "sums"]
    command += ["--mechanisms", "toy,toy_bad,toy_sees_all", "--seeds", "2", "--workers", "1", "--out", str(tmp_path)]
    first, again = (subprocess.run(command, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "[1/8, " in first.stdout and "toy · seed 1: done" in first.stdout
    assert "diverged: the loss was nan at step 1 of 30" in first.stdout
    assert "toy_sees_all" in first.stdout and "not causal" in first.stdout
    assert "Which one should I use here?" in first.stdout
    assert "sums: use toy" in first.stdout
    assert (tmp_path / "report" / "index.html").is_file()
    assert again.returncode == 0, again.stderr
    assert "8 of them done before" in again.stdout and "[1/" not in again.stdout
    answer = first.stdout[first.stdout.index("Which one") :]
    assert answer == again.stdout[again.stdout.index("Which one") :]

    refused = subprocess.run(
        [sys.executable, "-m", "attnlab.cli", "report", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2 and "--force" in refused.stderr
    run("report", str(tmp_path), "--to", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "trials.csv").is_file()


def test_compare_stops_at_ctrl_c_with_what_it_has(tmp_path):
    import signal
    import time

    command = [sys.executable, "-m", "attnlab.cli", "compare", "--load", str(TOYS), "--tasks", "sums"]
    command += ["--mechanisms", "toy_slow", "--seeds", "40", "--workers", "1", "--out", str(tmp_path)]
    # A shell's background jobs, and so these tests in one, begin deaf to Ctrl-C.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hears
    )
    until, lines = time.monotonic() + 120, []
    while not any(line.startswith("[2/") for line in lines):
        lines.append(running.stdout.readline())
        assert lines[-1] and time.monotonic() < until
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the study and its workers alike
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "jobs are kept; the same command goes on" in output
    assert "Traceback" not in errors


def test_the_command_line_starts_without_the_heavy_packages():
    code = (
        "import sys, attnlab.cli; print([m for m in ('torch', 'matplotlib', 'skimage', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_cannot_be_asked_leaves_nothing_behind(tmp_path):
    for wrong in (("--tasks", "recal"), ("--mechanisms", "multihed"), ("--budget", "huge"), ("--device", "tpu")):
        with pytest.raises(ValueError, match=r"recal|multihed|huge|tpu"):
            run("compare", "--out", str(tmp_path / "runs"), *wrong)
    assert not list(tmp_path.iterdir())


def test_compare_does_not_take_a_folder_of_something_else_for_its_report(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="report exists"):
        run("compare", "--tasks", "recall", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
