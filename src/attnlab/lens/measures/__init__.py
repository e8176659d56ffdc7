"""What is seen of attention, as numbers: pure functions of tensors. May import lens.event and what lies below lens.

Those of plain weights, and of records of them, are named here; each published measure has a module of its own.
"""

from attnlab.lazy import lazily

_NAMES = "entropy", "normalised_entropy", "max_weight", "received", "sink_mass", "mean_distance", "head_similarity"
_HOME = dict.fromkeys(_NAMES, "attnlab.lens.measures.weights")

__all__ = [*_HOME]


lazily(__name__, _HOME)
