"""Attention on one HTML page that needs no network. May import lens measures and records, and what lies below lens."""

from attnlab.lens.viewer.view import Measure, Tokens, View

__all__ = ["Measure", "Tokens", "View"]
