"""Mechanisms with a running state or a linear kernel. May import what nn may import."""
