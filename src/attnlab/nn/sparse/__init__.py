"""Mechanisms that look at a fixed or routed part of the keys. May import what nn may import."""
