"""A record of attention as one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from attnlab.lens.record import Entry, Record

_FORMAT, _VERSION = "attnlab.record", "1"
# How many axes behind the batch are heads, queries and keys; statistics are per query or per key.
_AXES = {"weights": 3, "outputs": 2, "stats": 1, "values": 0}


def write(record: Record, path: str | Path) -> None:
    """Tensors are named by the number of their call; all the rest is JSON in the metadata."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"no folder for the record file: {Path(path).parent}")
    own = {n: getattr(record, n) for n in ("what", "tokens", "grid", "prefix", "sinks", "model")}
    calls = [{**asdict(replace(e, kept={})), "kept": list(e.kept)} for e in record.entries]
    tensors = {
        # Each its own memory: safetensors refuses tensors that share some.
        f"{i}.{name}": x.detach().cpu().contiguous().clone()
        for i, e in enumerate(record.entries)
        for name, x in e.kept.items()
    }
    save_file(
        tensors, str(path), {"format": _FORMAT, "version": _VERSION, "record": json.dumps({**own, "calls": calls})}
    )


def read(path: str | Path) -> Record:
    """What `write` wrote, or a ValueError that says what is wrong with the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such record file: {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not a record of attention (Record.save writes those)")
    if metadata.get("version") != _VERSION:
        raise ValueError(f"{path} is a record of version {metadata.get('version')}; known here is {_VERSION}")
    try:
        own = json.loads(metadata["record"])
        calls = own.pop("calls")
        entries = [
            Entry(**{**call, "heads": tuple(call["heads"]), "kept": {n: tensors[f"{i}.{n}"] for n in call["kept"]}})
            for i, call in enumerate(calls)
        ]
        record = Record(own.pop("what"), entries, **own)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is a damaged record: {type(error).__name__} {error}") from error
    wrong = _wrong(record)
    if wrong:
        raise ValueError(f"{path} is a damaged record: {wrong}")
    return record


def _wrong(record: Record) -> str:
    """What does not fit together in a record that was read; "" if all does."""
    if record.what not in _AXES:
        return f"it holds {record.what!r}, not {', '.join(_AXES)}"
    for i, e in enumerate(record.entries):
        numbers = (e.layer, e.index, e.step, e.total, e.nq, e.nk, e.offset, *e.heads)
        if not isinstance(e.name, str) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            return f"call {i} is not numbered"
        if not all(h < e.total for h in e.heads):
            return f"it holds heads {list(e.heads)} of {e.total} in {e.name}"
        sizes = (len(e.heads), e.nq, e.nk)[: _AXES[record.what]]
        if sizes and any(x.shape[1 : 1 + len(sizes)] != sizes for x in e.kept.values()):
            shapes = ", ".join(str(tuple(x.shape)) for x in e.kept.values())
            return f"of {e.name} it holds {shapes} for {len(e.heads)} heads, {e.nq} queries and {e.nk} keys"
    return ""
