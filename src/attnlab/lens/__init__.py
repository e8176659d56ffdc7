"""Looking inside and steering: what the attention of any model does, in numbers and pictures, and what it does instead.

May import models and what lies below them. Names come at first use.
"""

from attnlab.lazy import lazily

_HOME = {
    "Event": "attnlab.lens.event",
    "Subscriber": "attnlab.lens.subscriber",
    "Tap": "attnlab.lens.tap",
    "tap": "attnlab.lens.tap",
    "Edit": "attnlab.lens.steer",
    "steer": "attnlab.lens.steer",
    "Record": "attnlab.lens.record",
    "watch": "attnlab.lens.watch",
}

__all__ = [*_HOME]


lazily(__name__, _HOME)
