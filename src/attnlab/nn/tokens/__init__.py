"""Attention through a few intermediate tokens. May import what nn may import."""
