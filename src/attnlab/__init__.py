"""attnlab: every published attention mechanism as a part that fits.

    attend, scan                the two operators
    patterns, weightings, …     where a query may look, and how much each key weighs
    build, names, describe      mechanisms and networks by name

Everything is imported at first use, so `import attnlab` costs next to nothing over torch.
"""

from typing import TYPE_CHECKING

from attnlab.lazy import lazily

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
    "lens",
    "scale",
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


lazily(__name__, _HOME, _MODULES)
