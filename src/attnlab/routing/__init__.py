"""Where a query may look, chosen from the content: a route turns q and k into a pattern. May import patterns only.

attend(q, k, v, route=TopKBlocks(8, block=256))              the 8 blocks of keys that suit each block of queries
attend(q, k, v, route=ThresholdBlocks(0.25, block=64))       as many blocks as hold a quarter of the score
attend(q, k, v, route=Clusters(16))                          keys and queries that fall into one cluster
attend(q, k, v, route=ProxyHeads(0.95))                      blocks of the past that an averaged head looks at

A route only chooses: gradients flow through the attention over what it chose, not through the choice. Scores are
always formed in at least float32, unscaled.
"""

from attnlab.routing.blocks import Chosen, Partition, Route, Routed
from attnlab.routing.budgets import BlockRoute, Scope, ThresholdBlocks, TopKBlocks, block_scores, candidates
from attnlab.routing.clusters import Clustered, Clusters, kmeans
from attnlab.routing.proxy import ProxyHeads

__all__ = [
    "BlockRoute",
    "Chosen",
    "Clustered",
    "Clusters",
    "Partition",
    "ProxyHeads",
    "Route",
    "Routed",
    "Scope",
    "ThresholdBlocks",
    "TopKBlocks",
    "block_scores",
    "candidates",
    "kmeans",
]
