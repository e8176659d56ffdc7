"""lucidrains/axial-attention, a port of arXiv 1912.12180: its attention and its encoder of images."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import official
from attnlab.models.vision.axial_encoder import AxialEncoder
from attnlab.nn.sparse.axial import AxialAttention


def projections(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """`to_q`, `to_kv` and `to_out` as ours, under whatever stands before them."""
    found = {}
    for name, value in params.items():
        if name.endswith("to_q.weight"):
            before = name.removesuffix("to_q.weight")
            found[f"{before}wqkv.weight"] = torch.cat((value, params[f"{before}to_kv.weight"]))
        elif "to_kv." not in name:
            found[name.replace("to_out.", "wo.")] = value
    return found


class Around(nn.Module):
    """Our attention of tokens on tensors whose channels stand on axis `channels`."""

    def __init__(self, attention: AxialAttention, channels: int) -> None:
        super().__init__()
        self.attention, self.channels = attention, channels

    def forward(self, x: Tensor) -> Tensor:
        maps = x.movedim(self.channels, -1)
        grid = tuple(maps.shape[1:-1])
        y = self.attention(maps.flatten(1, -2), grid=grid)
        return y.unflatten(1, grid).movedim(-1, self.channels)


@official("lucidrains/axial-attention", "AxialAttention", ours=AxialAttention)
class PortAttention:
    """Attentions in order of the tensor's axes, summed or one after the other."""

    @staticmethod
    def rename(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace("axial_attentions.", "attentions.").replace(".fn.", "."): p
                for n, p in projections(params).items()}  # fmt: skip

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> Around:
        module = AxialAttention(
            arguments["dim"],
            heads=arguments.get("heads", 8),
            head_dim=arguments.get("dim_heads"),
            axes=arguments.get("num_dimensions", 2),
            combine="sum" if arguments.get("sum_axial_out", True) else "sequence",
        )
        module.load_state_dict(PortAttention.rename(params))
        return Around(module, arguments.get("dim_index", -1))

    @staticmethod
    def run(module: Around, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}


@official("lucidrains/axial-attention", "AxialImageTransformer", ours=AxialEncoder)
class PortEncoder:
    """Blocks of attentions and of convolutions by turns, of two branches each; reversible ones have two streams."""

    @staticmethod
    def rename(params: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in projections(params).items():
            if name.startswith("pos_emb.param"):
                # (1, C, H, 1) and (1, C, 1, W).
                found["places.columns" if name.endswith("1") else "places.rows"] = value[0].flatten(1).t()
                continue
            match = re.fullmatch(r"layers\.blocks\.(\d+)\.(0|1|f\.net|g\.net)\.(.+)", name)
            if match is None:
                raise ValueError(f"unknown parameter {name!r}")
            block, half, rest = int(match[1]), int(match[2] in ("1", "g.net")), match[3]
            for theirs, ours in (
                ("fn.fn.", "attention."),
                ("fn.norm.", "norm."),
                ("0.g", "norm.weight"),
                ("0.b", "norm.bias"),
                ("1.", "conv1."),
                ("3.", "conv2."),
            ):
                if rest.startswith(theirs):
                    rest = ours + rest[len(theirs) :]
                    break
            found[f"branches.{2 * block + half}.{rest}"] = value.flatten() if rest.startswith("norm.") else value
        return found

    @staticmethod
    def build(arguments: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
        size, channels = arguments.get("axial_pos_emb_shape"), arguments.get("dim_index", 1)
        module = AxialEncoder(
            arguments["dim"],
            depth=arguments["depth"],
            heads=arguments.get("heads", 8),
            head_dim=arguments.get("dim_heads"),
            size=None if size is None else tuple(size),
            streams=2 if arguments.get("reversible", True) else 1,
        )
        module.load_state_dict(PortEncoder.rename(params))
        if channels not in (1, -3):
            raise ValueError(f"dim_index must be 1: convolutions want channels there, got {channels}")
        return module

    @staticmethod
    def run(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}
