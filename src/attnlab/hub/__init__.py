"""The authors' checkpoints, and our attention in others' models: transformers, timm, diffusers, torch.

May import models, recipes and the tap of lens, which imports nothing from here. Names come at first use.
"""

from typing import TYPE_CHECKING

from attnlab.lazy import lazily

_HOME = {
    "load_official": "attnlab.hub.checkpoints",
    "swap": "attnlab.hub.swap",
    "register_transformers": "attnlab.hub.transformers_attention",
    "register_timm": "attnlab.hub.timm_models",
    "spell_pattern": "attnlab.hub.spelling",
    "read_pattern": "attnlab.hub.spelling",
}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from attnlab.hub.checkpoints import load_official as load_official
    from attnlab.hub.spelling import read_pattern as read_pattern
    from attnlab.hub.spelling import spell_pattern as spell_pattern
    from attnlab.hub.swap import swap as swap
    from attnlab.hub.timm_models import register_timm as register_timm
    from attnlab.hub.transformers_attention import register_transformers as register_transformers


lazily(__name__, _HOME)
