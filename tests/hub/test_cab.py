"""CAB's library by its own names: masks as documented (not as computed there), torch's own layer, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlab.hub.official import find, parse_arguments
from attnlab.hub.official.cab import rename

D = torch.float64
METHODS = ("MultiheadAttention", "LocalAttention", "ABC", "NystromAttention", "CosformerAttention", "Performer", "Lara")


def params_of(name: str, dim: int = 12, slots: int = 4) -> dict[str, Tensor]:
    made = {f"{part}_proj.weight": torch.randn(dim, dim) / 2 for part in ("q", "k", "v", "out")}
    made |= {f"{part}_proj.bias": torch.randn(dim) for part in ("q", "k", "v", "out")}
    if name == "ABC":
        made |= {f"compress_{part}": torch.randn(dim // 2, slots) for part in "kv"}
    return made


def build(name: str, params: dict[str, Tensor] | None = None, **arguments: Any) -> tuple[Any, Any]:
    adapter = find("Shark-NLP/CAB", f"efficient_attention/modules/x.py::{name}")
    slots = {"num_landmarks": 4} if name in ("ABC", "NystromAttention", "Lara") else {}
    given = parse_arguments(repr({"embed_dim": 12, "num_heads": 2, **slots, **arguments}))
    module = adapter.build(given, params_of(name) if params is None else params)
    return adapter, module.double().eval()


@pytest.mark.parametrize("name", METHODS)
def test_what_padding_holds_has_no_influence(name: str) -> None:
    """In the library it has: LocalAttention shows padding inside the sequence, others mask the wrong heads."""
    causal = {"causal": True} if name in ("LocalAttention", "ABC") else {}
    adapter, module = build(name, **causal)
    query, hidden = torch.randn(2, 20, 12, dtype=D), torch.zeros(2, 20, dtype=torch.bool)
    hidden[0, 15:], hidden[1, 6:9] = True, True
    other = torch.where(hidden[..., None], 3 * torch.randn_like(query), query)
    if name in ("NystromAttention", "Performer"):  # whose landmarks, and largest feature, are of padding too
        module.variant = "paper"
    first, second = (adapter.run(module, {"query": q, "key_padding_mask": hidden})["y"] for q in (query, other))
    torch.testing.assert_close(first[~hidden], second[~hidden])
    assert not torch.allclose(first[~hidden], adapter.run(module, {"query": other})["y"][~hidden])


def test_vanilla_is_torchs_own_layer() -> None:
    params = params_of("MultiheadAttention")
    adapter, module = build("MultiheadAttention", params)
    torchs = nn.MultiheadAttention(12, 2, batch_first=True).double()
    ours = rename(params)
    torchs.load_state_dict(
        {
            "in_proj_weight": ours["wqkv.weight"],
            "in_proj_bias": ours["wqkv.bias"],
            "out_proj.weight": ours["wo.weight"],
            "out_proj.bias": ours["wo.bias"],
        }
    )
    query, key = torch.randn(2, 7, 12, dtype=D), torch.randn(2, 9, 12, dtype=D)
    hidden = torch.arange(9).expand(2, 9) > torch.tensor([[5], [8]])
    mask = torch.rand(7, 9) > 0.8
    for inputs in ({}, {"key_padding_mask": hidden}, {"attn_mask": mask}):
        wanted = torchs(query, key, key, need_weights=False, **inputs)[0]
        torch.testing.assert_close(adapter.run(module, {"query": query, "key": key, **inputs})["y"], wanted)


def test_a_local_window_has_the_librarys_width() -> None:
    for causal, keys in ((False, [3, 4, 5, 6, 7, 8, 9]), (True, [4, 5, 6])):
        adapter, module = build("LocalAttention", wsize=3, causal=causal)
        query = torch.randn(1, 12, 12, dtype=D, requires_grad=True)
        (gradient,) = torch.autograd.grad(adapter.run(module, {"query": query})["y"][0, 6].square().sum(), query)
        assert gradient[0].abs().sum(-1).nonzero()[:, 0].tolist() == keys


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("MultiheadAttention", {"kdim": 8}, "kdim must be embed_dim"),
        ("MultiheadAttention", {"add_bias_kv": True}, "add_bias_kv"),
        ("CosformerAttention", {"causal": True}, "causal=True"),
        ("CosformerAttention", {"act_fun": "elu"}, "act_fun"),
        ("NystromAttention", {"conv_kernel_size": 4}, "conv must be odd"),
    ],
)
def test_what_ours_have_not_is_refused(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(name, **arguments)


def test_values_of_other_tokens_than_the_keys_are_refused() -> None:
    adapter, module = build("ABC", cross=True)
    query, key, value = torch.randn(3, 2, 5, 12, dtype=D)
    with pytest.raises(ValueError, match="value must be key"):
        adapter.run(module, {"query": query, "key": key, "value": value})
    adapter, module = build("LocalAttention")
    with pytest.raises(ValueError, match="self-attention"):
        adapter.run(module, {"query": query, "key": key})
