"""Tasks with a known circuit, and small models that learn them in seconds on one core. May import models.

Each module is one task: `batch` draws prompts, `train(steps, seed)` gives a model that solves it.
"""
