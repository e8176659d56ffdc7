"""Softmax attention and its relatives with another weighting or gate. May import what nn may import."""
