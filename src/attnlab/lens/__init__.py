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
    "Ablate": "attnlab.lens.edits.heads",
    "CARVE": "attnlab.lens.edits.carve",
    "ConcentricPositions": "attnlab.lens.edits.concentric",
    "EmphasiseTokens": "attnlab.lens.edits.emphasise",
    "HeadDivergence": "attnlab.lens.edits.reinforce",
    "HeadsOff": "attnlab.lens.edits.heads_off",
    "ImageAttention": "attnlab.lens.edits.emphasise",
    "ImageGuidance": "attnlab.lens.edits.guidance",
    "LookAt": "attnlab.lens.edits.heads",
    "MaskKeys": "attnlab.lens.edits.heads",
    "NeighborhoodSteps": "attnlab.lens.edits.neighborhood",
    "Patch": "attnlab.lens.edits.heads",
    "RedistributeSinks": "attnlab.lens.edits.redistribute",
    "ReinforceHeads": "attnlab.lens.edits.reinforce",
    "Scale": "attnlab.lens.edits.heads",
    "Segmenter": "attnlab.lens.segment",
    "SoftInjection": "attnlab.lens.circuits.injection",
    "VLSAM": "attnlab.lens.vl_sam",
    "View": "attnlab.lens.viewer.view",
    "activation_patching": "attnlab.lens.circuits.patching",
    "analyse": "attnlab.lens.analytics",
    "at_heads": "attnlab.lens.edits.heads",
    "head_contributions": "attnlab.lens.circuits.contributions",
    "head_importance": "attnlab.lens.importance",
    "layerwise_relevance": "attnlab.lens.measures.relevance",
    "listen": "attnlab.lens.reasoning",
    "measure_sinks": "attnlab.lens.sinks",
    "path_patching": "attnlab.lens.circuits.patching",
    "salient_relevance": "attnlab.lens.measures.saliency",
    "task_embedding": "attnlab.lens.circuits.injection",
    "train_injection": "attnlab.lens.circuits.injection",
}

_ROOMS = ("measures", "edits", "circuits", "toys", "needles", "multimodal")

__all__ = [*_HOME, *_ROOMS]


lazily(__name__, _HOME, _ROOMS)
