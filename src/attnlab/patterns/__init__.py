"""Where a query may look, as data: `Window(512) | (Sinks(4) & Causal())`. May import torch only."""

from attnlab.patterns.base import Pattern
from attnlab.patterns.combine import And, Not, Or, Shifted
from attnlab.patterns.sequence import Causal, Dilated, Documents, Full, PowersOfTwo, Prefix, Sinks, Window

__all__ = [
    "And",
    "Causal",
    "Dilated",
    "Documents",
    "Full",
    "Not",
    "Or",
    "Pattern",
    "PowersOfTwo",
    "Prefix",
    "Shifted",
    "Sinks",
    "Window",
]
