"""Reorder, tile, gather, small dense attention: fast on the CPU for any pattern. May import patterns, layouts, cost."""
