"""Attention and modulation on grids and feature maps. May import what nn may import."""
