"""The authors' classes by their own names: build ours from their arguments and parameters. May import models and nn.

An adapter stands over one official class or function. Golden files are checked through it, and users load the authors'
checkpoints through it.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor


class Adapter(Protocol):
    """How one official class or function is built and run with our parts."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Any:
        """Our module (or callable) from the official constructor arguments, with the official parameters in it."""
        ...

    @staticmethod
    def run(module: Any, inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """The outputs by name (at least those of the golden file)."""
        ...


_adapters: dict[tuple[str, str], type] = {}
_by_ours: dict[type, type] = {}
_loaded = False


def official(repository: str, *names: str, ours: type | None = None) -> Callable[[type], type]:
    """Class decorator: this adapter serves the classes or functions `names` of `repository` ("owner/name").

    `ours` is our class whose checkpoints in the authors' layout the adapter's `rename` reads (`load_official`).
    """

    def add(adapter: type) -> type:
        for name in names:
            if _adapters.setdefault((repository, name), adapter) is not adapter:
                raise ValueError(f"{repository} {name} already has an adapter")
        if ours is not None:
            _by_ours.setdefault(ours, adapter)
        return adapter

    return add


def _load() -> None:
    global _loaded
    if not _loaded:
        for module in pkgutil.iter_modules(__path__, __name__ + "."):
            importlib.import_module(module.name)
        _loaded = True


def adapter_of(ours: type) -> Any:
    """The adapter whose `rename` reads the authors' checkpoints for our class `ours`."""
    _load()
    if ours not in _by_ours:
        known = ", ".join(sorted(c.__name__ for c in _by_ours))
        raise ValueError(f"no official checkpoint layout is known for {ours.__name__}; there are {known}")
    return _by_ours[ours]


def find(repository: str, name: str) -> type[Adapter]:
    """The adapter of an official class or function.

    `repository` and `name` may carry more text (a path, a remark): of the adapters whose repository occurs in
    `repository` and whose name occurs in `name` as whole words, the one with the longest name is it.
    """
    _load()
    fitting = [
        (len(ours), adapter)
        for (where, ours), adapter in _adapters.items()
        if where in repository and re.search(rf"(?<!\w){re.escape(ours)}(?!\w)", name)
    ]
    if not fitting:
        known = sorted(ours for where, ours in _adapters if where in repository)
        raise ValueError(
            f"no adapter for {name!r} of {repository!r}" + (f"; there are {', '.join(known)}" if known else "")
        )
    return max(fitting, key=lambda pair: pair[0])[1]


def parse_arguments(raw: Any, case_name: str = "", call: str = "") -> dict[str, Any]:
    """Constructor arguments as a dict, whether they came as one, as a Python literal, or as "a=1, b=2" with remarks.

    The untouched text is kept under "text", the official class's full name under "case_name", and how it was called, in
    words, under "call".
    """
    found: dict[str, Any] = {}
    if isinstance(raw, Mapping):
        found.update(raw)
    elif isinstance(raw, str):
        # A literal may be followed by remarks.
        inside = re.match(r"\s*\{.*\}", raw, re.DOTALL)
        try:
            literal = ast.literal_eval(inside[0].strip() if inside else raw)
        except (ValueError, SyntaxError):
            literal = None
        if isinstance(literal, Mapping):
            found.update(literal)
        else:
            for key, value in re.findall(r"(\w+)\s*=\s*(\([^)]*\)|\[[^\]]*\]|[^,;\s]+)", raw):
                found[key] = _literal(value)
    return {**found, "text": raw if isinstance(raw, str) else "", "case_name": case_name, "call": call}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
