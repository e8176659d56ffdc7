"""attnlab: every published attention mechanism as a part that fits.

    attend, scan                the two operators
    patterns, weightings, …     where a query may look, and how much each key weighs
    build, names, describe      mechanisms and networks by name

Everything is imported at first use, so `import attnlab` costs next to nothing over torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attend": "attnlab.attend",
    "explain": "attnlab.attend",
    "merge": "attnlab.merging",
    "statistics": "attnlab.statistics",
    "compiling": "attnlab.planner",
    "scan": "attnlab.scan",
    "build": "attnlab.cards",
    "describe": "attnlab.cards",
    "names": "attnlab.cards",
    "register": "attnlab.cards",
    "Card": "attnlab.cards",
}
_MODULES = (
    "patterns",
    "routing",
    "layouts",
    "weightings",
    "positions",
    "cards",
    "nn",
    "models",
    "recipes",
    "hub",
    "arena",
)

__all__ = ["__version__", *_HOME, *_MODULES]

if TYPE_CHECKING:
    from attnlab.attend import attend as attend
    from attnlab.attend import explain as explain
    from attnlab.cards import Card as Card
    from attnlab.cards import build as build
    from attnlab.cards import describe as describe
    from attnlab.cards import names as names
    from attnlab.cards import register as register
    from attnlab.merging import merge as merge
    from attnlab.planner import compiling as compiling
    from attnlab.scan import scan as scan
    from attnlab.statistics import statistics as statistics


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(f"attnlab.{name}")
    else:
        raise AttributeError(f"module 'attnlab' has no attribute {name!r}")
    globals()[name] = value
    return value


class _Package(ModuleType):
    """This package, in which a function wins over the module of the same name that holds it (attend, scan)."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module attnlab.attend would otherwise put it where the function is expected.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
