"""Patterns and routes as text, so that a configuration file can hold them: `Window(512) | (Sinks(4) & Causal())`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from attnlab import patterns, routing
from attnlab.patterns import Pattern
from attnlab.routing import Route

Where = Pattern | Route


def spell_pattern(where: Where) -> str:
    """`where` as text that `read` understands; ValueError where it holds tensors."""
    text = str(where)
    try:
        same = read_pattern(text) == where
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"where must be made of numbers alone to be written down, got {where}")
    return text


def read_pattern(given: str | Mapping[str, Any]) -> Where:
    """The pattern or route that `given` spells.

    Either text, a call of a class in `attnlab.patterns` or `attnlab.routing`, joined by `&`, `|` and `~`; or one such
    class as `{"name": "PowersOfTwo", "block": 256}`. Nothing is evaluated but such calls with literal arguments.
    """
    if isinstance(given, str):
        return _read(given)
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise TypeError(f'a pattern is spelled as text or as {{"name": "Window", "size": 512}}, got {given!r}')
    arguments = {name: _hashable(value) for name, value in given.items() if name != "name"}
    return _build(given["name"], (), arguments, repr(dict(given)))


@lru_cache(maxsize=256)
def _read(text: str) -> Where:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} does not spell a pattern: {error.msg}") from error
    return _where(tree, text)


def _where(node: ast.expr, text: str) -> Where:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = {k.arg: _value(k.value, text) for k in node.keywords if k.arg is not None}
        if len(arguments) == len(node.keywords):
            return _build(node.func.id, tuple(_value(a, text) for a in node.args), arguments, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_pattern(node.operand, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _pattern(node.left, text), _pattern(node.right, text)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    raise ValueError(f"{text!r} does not spell a pattern: write such as 'Window(512) | (Sinks(4) & Causal())'")


def _pattern(node: ast.expr, text: str) -> Pattern:
    found = _where(node, text)
    if not isinstance(found, Pattern):
        raise ValueError(f"{text!r} combines a route: only patterns go with & | ~")
    return found


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, (ast.Call, ast.BinOp)):
        return _where(node, text)
    try:
        return _hashable(ast.literal_eval(node))
    except ValueError as error:
        raise ValueError(f"{text!r} does not spell a pattern: arguments are numbers, words and tuples") from error


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _build(name: str, positional: tuple[Any, ...], named: dict[str, Any], text: str) -> Where:
    home = patterns if name in patterns.__all__ else routing
    made: Any = getattr(home, name, None) if name in home.__all__ else None
    if not _is_where(made):
        known = sorted(n for home in (patterns, routing) for n in home.__all__ if _is_where(getattr(home, n)))
        raise ValueError(f"{text!r} names no pattern or route: {name!r}; there are {', '.join(known)}")
    try:
        return made(*positional, **named)
    except TypeError as error:
        raise ValueError(f"{text!r} does not fit {name}: {error}") from error


def _is_where(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, (Pattern, Route)) and thing not in (Pattern, Route)
