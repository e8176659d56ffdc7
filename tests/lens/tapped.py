"""Small models to tap, and those who watch and edit them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import lens


class Seen(lens.Subscriber):
    def __init__(self):
        self.events = []
        self.outs = []
        self.weights_seen = []

    def after(self, event, out):
        self.events.append(event)
        self.outs.append(out)
        self.weights_seen.append(event.weights())


class Identity(lens.Edit):
    """Takes the road by hand and changes nothing."""

    def weights(self, event, weights):
        return weights


class Zero(lens.Edit):
    def output(self, event, out):
        return self.put(event, torch.zeros_like(out), out)


class Attend(nn.Module):
    """Self or cross attention through torch's kernel."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads, self.wq, self.wkv, self.wo = (
            heads,
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        k, v = self.wkv(x if context is None else context).chunk(2, -1)
        out = F.scaled_dot_product_attention(split(self.wq(x)), split(k), split(v), is_causal=causal)
        return self.wo(out.transpose(1, 2).flatten(2))


class ByHand(Attend):
    def forward(self, x: Tensor) -> Tensor:
        k, v = self.wkv(x).chunk(2, -1)
        weights = F.dropout((self.wq(x) @ k.mT).softmax(-1), 0.1, training=False)
        return self.wo(weights @ v)


class Two(nn.Module):
    def __init__(self, first=Attend, second=Attend):
        super().__init__()
        self.first, self.second = first(), second()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def clean(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def llama(transformers, layers=3):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()
