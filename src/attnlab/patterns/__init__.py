"""Where a query may look, as data: `Window(512) | (Sinks(4) & Causal())`. May import torch only."""

from attnlab.patterns.base import Pattern
from attnlab.patterns.combine import And, Not, Or, Shifted
from attnlab.patterns.given import Explicit, Regions
from attnlab.patterns.grid import Around, Axial, Blocks, Halo, Neighborhood, SoFar
from attnlab.patterns.groups import Groups
from attnlab.patterns.prefixed import Prefixed
from attnlab.patterns.sequence import Causal, Dilated, Documents, Full, PowersOfTwo, Prefix, Sinks, Window
from attnlab.patterns.spans import BlockCausal, From, Rectangle, Rectangles, Starts
from attnlab.patterns.speedup import Speedup, end_to_end, speedup

__all__ = [
    "And",
    "Around",
    "Axial",
    "BlockCausal",
    "Blocks",
    "Causal",
    "Dilated",
    "Documents",
    "Explicit",
    "From",
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
    "Rectangle",
    "Rectangles",
    "Regions",
    "Shifted",
    "Sinks",
    "SoFar",
    "Speedup",
    "Starts",
    "Window",
    "end_to_end",
    "speedup",
]
