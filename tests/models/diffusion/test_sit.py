"""SiT with attentive convolutions: which block mixes how, what it predicts, and the authors' names."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from attnlab.hub.official.atconv import SiT as Official
from attnlab.models.diffusion.dit import DiT
from attnlab.models.diffusion.sit import OnSquare, SiT
from attnlab.nn.multihead import MultiHead

TINY = {"size": 8, "dim": 24, "depth": 3, "heads": 3, "classes": 5, "mlp_ratio": 2.0}


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 4, 8, 8), torch.rand(batch), torch.randint(5, (batch,))


def shaken(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.eval()


@pytest.mark.parametrize(
    ("mixers", "kinds"),
    [
        ("attention", [MultiHead, MultiHead, MultiHead]),
        ("convolution", [OnSquare, OnSquare, OnSquare]),
        ("alternate", [MultiHead, OnSquare, MultiHead]),
    ],
)
def test_blocks_mix_as_asked_and_only_attention_needs_positions(mixers, kinds):
    net = SiT(**TINY, mixers=mixers)
    assert [type(block.attention) for block in net.blocks] == kinds
    assert ("positions" in net.state_dict()) == (MultiHead in kinds)


def test_with_attention_it_is_the_first_half_of_what_dit_predicts():
    net, dit = SiT(**TINY, mixers="attention"), DiT(**TINY)
    dit.load_state_dict(shaken(net).state_dict())
    x = inputs()
    assert torch.equal(net(*x), dit.eval()(*x)[:, :4])


def test_a_convolutional_block_mixes_what_time_and_class_shift():
    net = shaken(SiT(**TINY))
    block, tokens, condition = net.blocks[0], torch.randn(2, 16, 24), torch.randn(2, 24)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(silu(condition))[:, None].chunk(6, -1)
    y = block.norm(tokens) * (1 + scale1) + shift1
    y = tokens + gate1 * block.attention.conv(y.mT.unflatten(2, (4, 4))).flatten(2).mT
    wanted = y + gate2 * block.mlp(block.norm(y) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(tokens, condition), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixers", ["convolution", "alternate", "attention"])
def test_the_authors_checkpoints_load_by_their_names(mixers):
    net = shaken(SiT(**TINY, mixers=mixers))
    rules = (
        (r"^embedding\.", "x_embedder.proj."), (r"^positions$", "pos_embed"), (r"^time\.fc1", "t_embedder.mlp.0"),
        (r"^time\.fc2", "t_embedder.mlp.2"), (r"^label\.", "y_embedder.embedding_table."),
        (r"^head\.", "final_layer.linear."), (r"^modulation", "final_layer.modulation"),
        (r"modulation\.", "adaLN_modulation.1."), (r"attention\.(conv\.)?wo\.", "attn.proj."),
        (r"attention\.wqkv", "attn.qkv"), (r"attention\.conv\.wk", "attn.kernel_proj"),
        (r"attention\.conv\.wg", "attn.kernel_gen"), (r"attention\.conv\.wv", "attn.x_proj"),
        (r"attention\.conv\.inhibition", "attn.difference_control"),
    )  # fmt: skip
    theirs = {}
    for name, tensor in net.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        theirs[name] = tensor
    arguments = {"input_size": 8, "hidden_size": 24, "depth": 3, "num_heads": 3, "num_classes": 5, "mlp_ratio": 2.0}
    mixing = {"token_mixer": "attn" if mixers == "attention" else "atconv", "hybrid": mixers == "alternate"}
    x = inputs()
    torch.testing.assert_close(Official.build({**arguments, **mixing}, theirs)(*x), net(*x))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"mixers must be one of \('attention', 'convolution', 'alternate'\), got 'x'"):
        SiT(**TINY, mixers="x")
