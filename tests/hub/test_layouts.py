"""Every network reads its authors' checkpoints, or it is said why there are none to read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import attnlab
from attnlab import cards
from attnlab.hub import load_official
from attnlab.hub.official import adapter_of

# No layout is known for these: the reason stands beside each.
NONE = {
    "axial_transformer": "the authors' code is TensorFlow 1's",
    "deconstructed": "no code was released",
    "dependencyvit": "the authors' repository is empty; others published the attention alone",
    "minimal_transformer": "no code was released",
    "s2aformer": "no code was released",
    "stepnet": "no code was released",
    "swin_vsa": "the authors released ViTAEv2 with these windows, not Swin",
    "tic": "the authors released the operator and one layer, no network",
    "titans": "no code was released; others published the memory alone",
    "union_vit": "the authors released language models, no vision model",
    "vim2": "no code was released; others published the block alone",
}
NETWORKS = (cards.BACKBONE, cards.LM, cards.DENOISER)


@pytest.mark.parametrize("card", [e.card for e in cards.entries() if e.card.kind in NETWORKS], ids=lambda c: c.name)
def test_every_network_has_an_adapter_or_a_reason(card) -> None:
    name, arguments = (next(iter(card.sizes)), {}) if card.sizes else (card.name, card.sample)
    with torch.device("meta"):
        model = attnlab.build(name, **arguments)
    if card.name in NONE:
        with pytest.raises(ValueError, match="no official checkpoint layout is known"):
            adapter_of(type(model))
    else:
        assert callable(adapter_of(type(model)).rename)


def scattered(model: nn.Module) -> nn.Module:
    """Every parameter a value of its own."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def test_language_models_of_union_attention(tmp_path) -> None:
    sizes = dict(vocabulary=40, dim=24, depth=2, heads=4, hidden=48, cutoffs=(10, 25), reach=24, memory=8)
    ours = scattered(attnlab.build("uoe", **sizes))
    own = ours.state_dict()
    theirs: dict[str, Tensor] = {
        "word_emb.emb_layers.0.weight": own["embedding.weight"],
        "crit.out_layers.0.weight": own["embedding.weight"].clone(),  # tied
        "crit.out_layers.0.bias": own["embedding.bias"],
        "crit.cluster_weight": own["embedding.cluster_weight"],
        "crit.cluster_bias": own["embedding.cluster_bias"],
        "r_emb": own["places"].view(2, 24, 4, 6),
    }
    for i in range(2):
        block = {n.removeprefix(f"blocks.{i}."): t for n, t in own.items() if n.startswith(f"blocks.{i}.")}
        attention, mlp = f"layers.{i}.dec_attn.", f"layers.{i}.pos_ff."
        for kind in ("weight", "bias"):
            theirs[f"{attention}switch_gate.w_gate.{kind}"] = block[f"mixer.gate.linear.{kind}"]
            theirs[f"{mlp}switch_gate.w_gate.{kind}"] = block[f"mlp.gate.linear.{kind}"]
            theirs[f"{attention}layer_norm.{kind}"] = block[f"norm1.{kind}"]
            theirs[f"{mlp}layer_norm.{kind}"] = block[f"norm2.{kind}"]
        # Queries of each head, then keys and values side by side; biases with a row for the batch.
        theirs[f"{attention}W_q.weight.0"], theirs[f"{attention}W_kv.weight.0"] = block["mixer.wqkv"].split([6, 12], -1)
        bias = block["mixer.bqkv"].unsqueeze(1)
        theirs[f"{attention}W_q.bias.0"], theirs[f"{attention}W_kv.bias.0"] = bias.split([6, 12], -1)
        theirs[f"{attention}ff.weight.0"], theirs[f"{attention}ff.bias"] = block["mixer.wo"], block["mixer.bo"]
        theirs[f"{mlp}linear1.weight.0"], theirs[f"{mlp}linear1.bias.0"] = block["mlp.w1"], block["mlp.b1"].unsqueeze(1)
        theirs[f"{mlp}linear2.weight.0"], theirs[f"{mlp}linear2.bias"] = block["mlp.w2"], block["mlp.b2"]
        theirs[f"{mlp}linear3.weight"], theirs[f"{mlp}linear3.bias"] = torch.randn(24, 24), torch.randn(24)  # unused
    save_file({n: t.contiguous() for n, t in theirs.items()}, tmp_path / "theirs.safetensors")
    other = load_official(attnlab.build("uoe", **sizes), tmp_path / "theirs.safetensors").eval()
    ids = torch.randint(0, 40, (2, 10))
    assert torch.equal(other(ids), ours(ids))


@torch.no_grad()
@pytest.mark.parametrize("dense", [True, False])
def test_torchvision_transformers_with_infinite_attention(tmp_path, dense) -> None:
    sizes = dict(dim=16, depth=2, heads=2, image=32, patch=8, num_classes=3, linear=False, dense=dense)
    ours = scattered(attnlab.build("infvit", **sizes))
    own = ours.state_dict()
    theirs = {
        "class_token": own["class_token"].view(1, 1, -1),
        "encoder.pos_embedding": own["positions.table"].unsqueeze(0),
    }
    pairs = {"conv_proj": "patches", "encoder.ln": "encoder.norm"}
    pairs |= {"heads.pre_logits": "head.0", "heads.head": "head.2"} if dense else {"heads.head": "head"}
    for i in range(2):
        layer, block = f"encoder.layers.encoder_layer_{i}.", f"encoder.blocks.{i}."
        pairs |= {f"{layer}ln_{k}": f"{block}norm{k}" for k in (1, 2)}
        pairs |= {f"{layer}mlp.0": f"{block}mlp.fc1", f"{layer}mlp.3": f"{block}mlp.fc2"}
        pairs[f"{layer}self_attention.out_proj"] = f"{block}mixer.wo"
        theirs[f"{layer}self_attention.rho_logit"] = own[f"{block}mixer.rho_logit"]
        for kind in ("weight", "bias"):
            for part, t in zip("qkv", own[f"{block}mixer.wqkv.{kind}"].chunk(3), strict=True):
                theirs[f"{layer}self_attention.{part}_proj.{kind}"] = t
    theirs |= {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")}
    save_file({n: t.contiguous() for n, t in theirs.items()}, tmp_path / "theirs.safetensors")
    other = load_official(attnlab.build("infvit", **sizes), tmp_path / "theirs.safetensors").eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(images), ours(images))
