"""The authors' checkpoints, and swapping mechanisms into others' models. May import models and recipes."""
