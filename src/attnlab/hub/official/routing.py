"""lucidrains/routing-transformer, a port of arXiv 2003.05997: attention within k-means clusters, and its means."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.nn.sparse.cluster_routing import OnlineMeans, cluster_attention


class Heads(nn.Module):
    """The routed heads alone, on q, k and v `(B, H, N, D)`: (out, the loss of the means)."""

    def __init__(self, means: OnlineMeans, memory: tuple[Tensor, Tensor] | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.means, self.memory, self.options = means, memory, options

    def forward(self, q: Tensor, k: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
        window, shared = self.options["window_size"], self.options.get("shared_qk", False)
        key_window = self.options.get("context_window_size") or window
        near_q = F.normalize(q, dim=-1)
        if shared or k is None:
            tokens = k = near_q
            queries = keys = self.means.members(near_q, window)
        else:
            near_k = F.normalize(k, dim=-1)
            tokens = torch.cat((near_q, near_k), 2)
            queries, keys = self.means.members(near_q, window), self.means.members(near_k, key_window)
        out = cluster_attention(
            q, k, v, queries, keys,
            causal=self.options.get("causal", False), memory=self.memory, own_last=shared, eps=1e-5,
        )  # fmt: skip
        return out, self.options.get("commitment", 1e-4) * self.means.commitment(tokens)


@official("lucidrains/routing-transformer", "KmeansAttention")
class PortAttention:
    """In evaluation, with means that are there already."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Heads:
        means = OnlineMeans(*params["kmeans.means"].shape, decay=arguments.get("ema_decay", 0.999))
        means.load_state_dict({"means": params["kmeans.means"], "started": params["kmeans.initted"]})
        memory = (params["mem_key"], params["mem_value"]) if "mem_key" in params else None
        return Heads(means, memory, arguments)

    @staticmethod
    def run(module: Heads, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out, loss = module(inputs["q"], inputs.get("k"), inputs["v"])
        return {"out": out, "aux_loss": loss.reshape(1)}


@official("lucidrains/routing-transformer", "kmeans_iter")
class PortUpdate:
    """One round of k-means, and how far it moves the means."""

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> float:
        words = str(arguments["text"]).split()
        return float(words[words.index("decay") + 1]) if "decay" in words else arguments.get("decay", 0.999)

    @staticmethod
    def run(module: float, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        means = OnlineMeans(*inputs["means"].shape, decay=module)
        means.means.copy_(inputs["means"])
        means.update(inputs["x"])
        return {"iter": means.one_round(inputs["x"], inputs["means"]), "ema": means.means}
