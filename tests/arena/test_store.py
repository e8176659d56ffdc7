import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from attnlab.arena.store import SCHEMA, Store, StoreError, Study

STUDY = Study(0, "2026", "attnlab compare", {"seeds": 1}, {"torch": "2"}, ["a", "b"], [], {"sums": {}})


def record(**more):
    return {"status": "done", "mechanism": "toy", "task": "sums", "seed": 0, "score": 1.0, **more}


def test_results_come_back_as_they_were(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.save("a", "trial", record(curve=[[1, 2.0]], details={"x": {"1": 2}}))
        store.save("b", "sweep", record(task=None))
    with Store(tmp_path / "r.sqlite") as store:
        assert store.results()["a"] == record(curve=[[1, 2.0]], details={"x": {"1": 2}})
        assert list(store.results(kind="sweep")) == ["b"]
        assert list(store.results(["b", "c"])) == ["b"]


def test_a_result_replaces_the_one_of_its_key(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.save("a", "trial", record(status="failed"))
        store.save("a", "trial", record())
        assert [r["status"] for r in store.results().values()] == ["done"]


def test_a_study_begun_again_is_the_same_study(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        assert store.begin(STUDY) == store.begin(STUDY) == 1
        assert store.study().plan == ["a", "b"]
        with pytest.raises(StoreError, match="no study 7; it has 1"):
            store.study(7)


def test_the_journal_is_a_write_ahead_log(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        assert store.connection.execute("pragma journal_mode").fetchone() == ("wal",)


def test_a_file_of_something_else_is_named_and_not_touched(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("Dear Sir or Madam, " * 100)
    with pytest.raises(StoreError, match="not a results file of attnlab; it was not touched"):
        Store(path)
    assert path.read_text() == "Dear Sir or Madam, " * 100


def test_a_database_of_another_program_is_named_and_not_touched(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("create table recipes (name)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="some other program"):
        Store(path)
    assert path.read_bytes() == before


def test_a_newer_schema_is_named_and_not_touched(tmp_path):
    path = tmp_path / "r.sqlite"
    with Store(path) as store:
        store.connection.execute(f"pragma user_version = {SCHEMA + 1}")
    with pytest.raises(
        StoreError, match=rf"newer attnlab \(results schema {SCHEMA + 1}; this one reads up to {SCHEMA}\)"
    ):
        Store(path)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "r.sqlite"
    with Store(path) as store:
        for i in range(50):
            store.save(str(i), "trial", record(details={"text": "x" * 4000}))
    contents = bytearray(path.read_bytes())
    contents[4096 : len(contents) - 4096] = b"\xff" * (len(contents) - 8192)
    path.write_bytes(contents)
    with pytest.raises(StoreError, match=r"damaged .*recover"), Store(path) as store:
        store.results()


def test_a_directory_is_not_a_file(tmp_path):
    with pytest.raises(StoreError, match="is a directory"):
        Store(tmp_path)


def test_a_file_that_must_exist_is_not_made(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        Store(tmp_path / "none.sqlite", must_exist=True)
    assert not list(tmp_path.iterdir())


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Store(tmp_path / "file" / "r.sqlite")


def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    path = tmp_path / "r.sqlite"
    with Store(path) as store:
        store.save("before", "trial", record())
        pages = store.connection.execute("pragma page_count").fetchone()[0]
        store.connection.execute(f"pragma max_page_count = {pages + 1}")  # SQLite's own word for a full disk
        with pytest.raises(StoreError, match="disk is full"):
            store.save("after", "trial", record(details={"text": "x" * 100_000}))
        assert list(store.results()) == ["before"]
    with Store(path) as store:
        assert list(store.results()) == ["before"]
        store.save("after", "trial", record())


def test_a_kill_while_writing_leaves_whole_results(tmp_path):
    path = tmp_path / "r.sqlite"
    code = (
        "import sys; from attnlab.arena.store import Store; store = Store(sys.argv[1]); i = 0\n"
        "while True: store.save(str(i), 'trial', dict(status='done', mechanism='m', text='x' * 50_000, i=i)); i += 1"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    until = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 500_000:
        assert time.monotonic() < until and writer.poll() is None
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    with Store(path) as store:
        assert store.connection.execute("pragma integrity_check").fetchone() == ("ok",)
        results = store.results()
        assert [results[str(i)]["i"] for i in range(len(results))] == list(range(len(results)))
        assert len(results) > 5
