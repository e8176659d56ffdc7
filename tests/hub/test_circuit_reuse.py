"""A transformer as TransformerLens holds it, with our parts, computes what GPT-2 of the same weights does."""

import torch
from torch import nn

from attnlab.hub.official.circuit_reuse import PathPatching


def test_gpt2s_weights_by_transformer_lens_names_give_gpt2s_logits(transformers) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=13, n_positions=16)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    state = theirs.state_dict()
    params = {
        "embed.W_E": state["transformer.wte.weight"],
        "pos_embed.W_pos": state["transformer.wpe.weight"],
        "unembed.W_U": state["lm_head.weight"].T,
        "ln_final.w": state["transformer.ln_f.weight"],
        "ln_final.b": state["transformer.ln_f.bias"],
    }
    for i in range(2):
        a, b = f"transformer.h.{i}.", f"blocks.{i}."
        weights, biases = state[a + "attn.c_attn.weight"].split(24, 1), state[a + "attn.c_attn.bias"].split(24)
        for kind, weight, bias in zip("QKV", weights, biases, strict=True):
            params[b + f"attn.W_{kind}"] = weight.reshape(24, 3, 8).transpose(0, 1)
            params[b + f"attn.b_{kind}"] = bias.view(3, 8)
        params[b + "attn.W_O"] = state[a + "attn.c_proj.weight"].view(3, 8, 24)
        params[b + "attn.b_O"] = state[a + "attn.c_proj.bias"]
        for which, name in (("in", "c_fc"), ("out", "c_proj")):
            params[b + f"mlp.W_{which}"] = state[a + f"mlp.{name}.weight"]
            params[b + f"mlp.b_{which}"] = state[a + f"mlp.{name}.bias"]
        for which in "12":
            params[b + f"ln{which}.w"] = state[a + f"ln_{which}.weight"]
            params[b + f"ln{which}.b"] = state[a + f"ln_{which}.bias"]
    arguments = dict(d_model=24, n_layers=2, n_heads=3, d_head=8, d_mlp=96, act="gelu_new", norm="LN, eps 1e-5")
    ours, _ = PathPatching.build(arguments, params)
    ids = torch.randint(13, (2, 9))
    torch.testing.assert_close(ours.double()(ids), theirs(ids).logits)
