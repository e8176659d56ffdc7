"""Attention along channels, and channel mixers. May import what nn may import."""
