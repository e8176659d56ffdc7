"""Past one machine: attention and scans over sequences that are spread over ranks of `torch.distributed`.

May import everything but the arena and the command line. Names come at first use.
"""

from attnlab.lazy import lazily

_HOME = {
    "attend": "attnlab.scale.operators",
    "scan": "attnlab.scale.operators",
    "Layout": "attnlab.scale.layout",
    "parallelize": "attnlab.scale.parallelize",
    "watch": "attnlab.scale.faults",
    "RankLost": "attnlab.scale.faults",
    "save": "attnlab.scale.checkpoint",
    "resume": "attnlab.scale.checkpoint",
    "traffic": "attnlab.scale.wire",
    "simulate": "attnlab.scale.simulated",
}

__all__ = [*_HOME]


lazily(__name__, _HOME)
