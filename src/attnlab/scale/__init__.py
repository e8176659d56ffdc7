"""Past one machine: attention and scans over sequences that are spread over ranks of `torch.distributed`.

May import everything but the arena and the command line. Names come at first use.
"""

from typing import TYPE_CHECKING

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
    "plan": "attnlab.scale.plan",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from attnlab.scale.checkpoint import resume as resume
    from attnlab.scale.checkpoint import save as save
    from attnlab.scale.faults import RankLost as RankLost
    from attnlab.scale.faults import watch as watch
    from attnlab.scale.layout import Layout as Layout
    from attnlab.scale.operators import attend as attend
    from attnlab.scale.operators import scan as scan
    from attnlab.scale.parallelize import parallelize as parallelize
    from attnlab.scale.plan import plan as plan
    from attnlab.scale.simulated import simulate as simulate
    from attnlab.scale.wire import traffic as traffic


lazily(__name__, _HOME, ("unified", "oracle"))
