"""Ways to compute attend, one file each. May import patterns, layouts, weightings and cost."""
