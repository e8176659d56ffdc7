"""The authors' checkpoints, and swapping mechanisms into others' models. May import models and recipes."""

from attnlab.hub.checkpoints import load_official

__all__ = ["load_official"]
