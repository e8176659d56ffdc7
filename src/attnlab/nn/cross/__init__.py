"""Attention from one set of tokens to another. May import what nn may import."""
