"""What places do: rotations of queries and keys, biases on scores, vectors on tokens. May import attnlab.problem."""

from attnlab.positions.base import Position
from attnlab.positions.bias import ALiBi, BucketBias, TableBias, alibi_slopes, buckets
from attnlab.positions.dynamic import DynamicBias
from attnlab.positions.learned import Learned
from attnlab.positions.rotary import NTK, Linear, Llama3, Rotary, RotaryGrid, Scaling, YaRN, rotate

__all__ = [
    "NTK",
    "ALiBi",
    "BucketBias",
    "DynamicBias",
    "Learned",
    "Linear",
    "Llama3",
    "Position",
    "Rotary",
    "RotaryGrid",
    "Scaling",
    "TableBias",
    "YaRN",
    "alibi_slopes",
    "buckets",
    "rotate",
]
