"""The authors' sigmoid attention by its equations, with every option of its constructor: beyond the golden files."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.hub.official import find, parse_arguments
from attnlab.positions import alibi_slopes

REPOSITORY = "apple/ml-sigmoid-attention"
HEADS, DIM, N = 3, 24, 6


def theirs(arguments: dict, p: dict[str, Tensor], x: Tensor, context: Tensor, causal: bool) -> dict[str, Tensor]:
    """Norms, rotation, scores, position, mask, temperature, shift, activation: in the authors' order."""
    d = DIM // HEADS
    if "qkv.weight" in p:
        q, k, v = F.linear(x, p["qkv.weight"], p.get("qkv.bias")).chunk(3, -1)
    else:
        q = F.linear(x, p["q_proj.weight"], p.get("q_proj.bias"))
        k, v = F.linear(context, p["kv_proj.weight"], p.get("kv_proj.bias")).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (HEADS, d)).transpose(1, 2) for t in (q, k, v))

    def norm(t: Tensor, name: str) -> Tensor:
        return F.layer_norm(t, (d,), p[f"{name}.weight"], p[f"{name}.bias"]) if f"{name}.weight" in p else t

    q, k, v = norm(q, "q_norm"), norm(k, "k_norm"), norm(v, "v_norm")
    if "qk_transform" in arguments:

        def turn(t: Tensor) -> Tensor:
            angle = torch.arange(t.shape[2])[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
            pairs = torch.view_as_complex(t.reshape(*t.shape[:3], d // 2, 2).contiguous())
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)).flatten(3)

        q, k = turn(q), turn(k)
    scores = q @ k.mT / math.sqrt(d)
    if "attn_logits_transform" in arguments:
        at = torch.arange(k.shape[2])
        scores = scores + alibi_slopes(HEADS)[:, None, None].float() * (at - at[:, None])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.finfo(scores.dtype).max)
    scores = scores * p["attn_temp"].exp() + p["attn_bias"]
    kind = arguments["attn_activ_fn"]
    weights = scores.softmax(-1) if kind == "softmax" else scores.sigmoid()
    place = torch.arange(1, scores.shape[-2] + 1)[:, None]
    if kind == "sqrt_seq_len_normalized_sigmoid":
        weights = weights / place.sqrt()
    if kind == "seq_len_normalized_sigmoid":
        weights = weights / place
    times = (weights @ v).transpose(1, 2).flatten(2)
    return {
        "attn_matrix": weights,
        "attn_times_v": times,
        "attn_proj": F.linear(times, p["proj.weight"], p.get("proj.bias")),
    }


def case(cross: bool, position: str | None, norm: bool, bias: bool, causal: bool, kind: str) -> tuple[dict, dict]:
    d, shapes = DIM // HEADS, {"proj.weight": (DIM, DIM), "attn_bias": (1,), "attn_temp": (1,)}
    names = {"q_proj": DIM, "kv_proj": 2 * DIM} if cross else {"qkv": 3 * DIM}
    shapes |= {f"{n}.weight": (rows, DIM) for n, rows in names.items()}
    if bias:
        shapes |= {f"{n}.bias": (rows,) for n, rows in {**names, "proj": DIM}.items()}
    for name in (*(("q_norm", "k_norm") if norm else ()), *(("v_norm",) if cross else ())):
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    arguments: dict = {"dim": DIM, "num_heads": HEADS, "attn_activ_fn": kind, "bias": bias, "qk_norm": norm}
    if causal:
        arguments["masking_fn"] = "softmax_masking_fn"
    if position is not None:
        arguments["qk_transform" if position == "rope" else "attn_logits_transform"] = (
            "apply_rotary_emb" if position == "rope" else "alibi"
        )
    return arguments, {n: 0.5 * torch.randn(s) for n, s in shapes.items()}


KINDS = ["sigmoid", "softmax", "sqrt_seq_len_normalized_sigmoid", "seq_len_normalized_sigmoid"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_equals_the_authors_equations(cross: bool, position: str | None, kind: str) -> None:
    for norm, bias, causal in itertools.product((False, True), repeat=3):
        arguments, params = case(cross, position, norm, bias, causal, kind)
        x, context = torch.randn(2, N, DIM), torch.randn(2, N, DIM)
        name = "layers/attention.py::" + ("CrossAttention" if cross else "Attention")
        adapter = find(REPOSITORY, name)
        module = adapter.build(parse_arguments(str(arguments), name), params).eval()
        ours = adapter.run(module, {"q": x, "kv": context} if cross else {"x": x})
        for output, wanted in theirs(arguments, params, x, context, causal).items():
            torch.testing.assert_close(ours[output], wanted, rtol=1e-4, atol=1e-5)


def test_the_released_norm_depends_on_the_size_of_the_whole_tensor() -> None:
    module = find(REPOSITORY, "RMSNorm").build({}, {"weight": torch.ones(8)})
    x = torch.randn(4, 8)
    assert not torch.allclose(module(x), module(x[:1]))
    torch.testing.assert_close(module(x), x / (x.norm(dim=-1, keepdim=True) / math.sqrt(32)))
