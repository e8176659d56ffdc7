"""Where results live: one SQLite file. Each result is written in one transaction, as soon as it is there."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

SCHEMA = 1
_APPLICATION = 0x6174746E  # "attn" in SQLite's header: this file is ours
_TABLES = """
create table study (
    id integer primary key, started text not null, command text not null, settings text not null,
    versions text not null, plan text not null, left_out text not null, about text not null);
create table result (
    key text primary key, kind text not null, status text not null, task text, mechanism text not null, seed integer,
    finished text not null, record text not null);
"""


class StoreError(Exception):
    """The results file cannot be used as it is; says why, what is safe, and what to do."""


@dataclass(frozen=True)
class Study:
    """One `compare`: what was asked, with what, and the keys of the results that belong to it."""

    id: int
    started: str
    command: str
    settings: dict
    versions: dict
    plan: list[str]
    left_out: list[list[str]]  # task, mechanism, reason
    about: dict[str, dict]  # task → title, metric, better, layout, trivial (name and value)


class Store:
    """The results file; `with Store(path) as store`. Made when missing unless `must_exist`."""

    def __init__(self, path: Path | str, *, must_exist: bool = False):
        self.path = Path(path)
        if must_exist and not self.path.exists():
            raise StoreError(f"{self.path} does not exist; attnlab compare makes it")
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a directory, not a results file")
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(self.path, isolation_level=None, timeout=30)
        try:
            with self._explained():
                self._open()
        except BaseException:
            self.connection.close()
            raise

    def _open(self) -> None:
        ours, schema = (self._one(f"pragma {name}") for name in ("application_id", "user_version"))
        if ours != _APPLICATION:
            if self._one("select count(*) from sqlite_master"):
                raise StoreError(
                    f"{self.path} is a database of some other program; it was not touched. Choose another --out"
                )
            self.connection.execute(
                "pragma journal_mode = wal"
            )  # first: a crash while writing loses nothing written before
            with self._transaction():
                for statement in _TABLES.split(";"):
                    self.connection.execute(statement)
                self.connection.execute(f"pragma application_id = {_APPLICATION}")
                self.connection.execute(f"pragma user_version = {SCHEMA}")
        elif schema > SCHEMA:
            raise StoreError(
                f"{self.path} was written by a newer attnlab (results schema {schema}; this one reads up to {SCHEMA}); "
                "it was not touched. Upgrade attnlab, or choose another --out"
            )

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            self.connection.close()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error

    # results -----------------------------------------------------------------------------------

    def save(self, key: str, kind: str, record: dict) -> None:
        """Writes one result; the one of the same key before it is replaced."""
        row = (key, kind, record["status"], record.get("task"), record["mechanism"], record.get("seed"), _now())
        with self._explained(), self._transaction():
            self.connection.execute(
                "insert or replace into result values (?, ?, ?, ?, ?, ?, ?, ?)", (*row, json.dumps(record))
            )

    def results(self, keys: list[str] | None = None, kind: str | None = None) -> dict[str, dict]:
        """Records by key, of the given keys and kind or of all."""
        with self._explained():
            rows = self.connection.execute("select key, kind, record from result order by rowid").fetchall()
            wanted = None if keys is None else set(keys)
            return {
                key: json.loads(record)
                for key, its_kind, record in rows
                if (wanted is None or key in wanted) and (kind is None or its_kind == kind)
            }

    # studies -----------------------------------------------------------------------------------

    def begin(self, study: Study) -> int:
        """Notes a study. The same one begun again keeps its number, so that a resumed study is one study."""
        values = (study.command, *(json.dumps(x) for x in (study.settings, study.versions, study.plan)))
        with self._explained(), self._transaction():
            known = self.connection.execute(
                "select id from study where settings = ? and versions = ? and plan = ? order by id desc", values[1:]
            ).fetchone()
            if known:
                return known[0]
            return self.connection.execute(
                "insert into study values (null, ?, ?, ?, ?, ?, ?, ?)",
                (study.started, *values, json.dumps(study.left_out), json.dumps(study.about)),
            ).lastrowid  # type: ignore[return-value]

    def study(self, number: int | None = None) -> Study:
        """The study of that number; without one, the last."""
        with self._explained():
            rows = self.connection.execute("select * from study order by id").fetchall()
            found = [row for row in rows if number is None or row[0] == number]
            if not found:
                known = f"it has {', '.join(str(row[0]) for row in rows)}" if rows else "it has none yet"
                raise StoreError(f"{self.path} holds no study{'' if number is None else f' {number}'}; {known}")
            row = found[-1]
            return Study(*row[:3], *(json.loads(value) for value in row[3:]))

    # sqlite ------------------------------------------------------------------------------------

    def _one(self, statement: str) -> int:
        return self.connection.execute(statement).fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.connection.execute("begin immediate")
        try:
            yield
            self.connection.execute("commit")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("rollback")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns SQLite's and the system's complaints into sentences."""
        try:
            yield
        except (sqlite3.Error, OSError, json.JSONDecodeError) as error:
            raise StoreError(f"{self.path}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    text = str(error)
    if "full" in text or "No space left" in text:
        return "the disk is full. All results written before are safe; make room and give the same command again"
    if "not a database" in text:
        return "this is not a results file of attnlab; it was not touched. Choose another --out"
    if "malformed" in text or isinstance(error, json.JSONDecodeError):
        return f"the file is damaged ({text}); move it away, or recover it with: sqlite3 FILE .recover"
    if "unable to open" in text or "readonly" in text or "Permission" in text or "not permitted" in text:
        return f"cannot be opened for reading and writing ({text}); check its permissions and its directory's"
    if "locked" in text:
        return "another program has been writing to it for 30 s; wait for it, or choose another --out"
    return text


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
