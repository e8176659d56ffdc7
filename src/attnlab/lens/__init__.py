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
    "AGLA": "attnlab.lens.edits.agla",
    "CARVE": "attnlab.lens.edits.carve",
    "ConcentricPositions": "attnlab.lens.edits.concentric",
    "EmphasiseTokens": "attnlab.lens.edits.emphasise",
    "HeadDivergence": "attnlab.lens.edits.reinforce",
    "HeadsOff": "attnlab.lens.edits.heads_off",
    "ImageAttention": "attnlab.lens.edits.emphasise",
    "ImageGuidance": "attnlab.lens.edits.guidance",
    "RedistributeSinks": "attnlab.lens.edits.redistribute",
    "NeighborhoodSteps": "attnlab.lens.edits.neighborhood",
    "ReinforceHeads": "attnlab.lens.edits.reinforce",
    "Segmenter": "attnlab.lens.segment",
    "VLSAM": "attnlab.lens.vl_sam",
    "View": "attnlab.lens.viewer.view",
    "analyse": "attnlab.lens.analytics",
    "head_importance": "attnlab.lens.importance",
    "layerwise_relevance": "attnlab.lens.measures.relevance",
    "listen": "attnlab.lens.reasoning",
    "measure_sinks": "attnlab.lens.sinks",
    "salient_relevance": "attnlab.lens.measures.saliency",
}

__all__ = [*_HOME]


lazily(__name__, _HOME)
