"""Where a query may look, as data: `Window(512) | (Sinks(4) & Causal())`. May import torch only."""

from attnlab.patterns.base import Pattern
from attnlab.patterns.combine import And, Not, Or, Shifted
from attnlab.patterns.given import Explicit, Regions
from attnlab.patterns.grid import Around, Axial, Blocks, Halo, Neighborhood, SoFar
from attnlab.patterns.groups import Groups
from attnlab.patterns.prefixed import Prefixed
from attnlab.patterns.sequence import Causal, Dilated, Documents, Full, PowersOfTwo, Prefix, Sinks, Window
from attnlab.patterns.speedup import Speedup, end_to_end, speedup

__all__ = [
    "And",
    "Around",
    "Axial",
    "Blocks",
    "Causal",
    "Dilated",
    "Documents",
    "Explicit",
    "Full",
    "Groups",
    "Halo",
    "Neighborhood",
    "Not",
    "Or",
    "Pattern",
    "PowersOfTwo",
    "Prefix",
    "Prefixed",
    "Regions",
    "Shifted",
    "Sinks",
    "SoFar",
    "Speedup",
    "Window",
    "end_to_end",
    "speedup",
]
