"""Tiny LLaVA- and Qwen2-VL-shaped models of transformers, and a question for each."""

from __future__ import annotations

import torch

from lens.tiny_models import llava, louder, qwen, qwen_inputs

IMAGE = 3  # LLaVA's image token
SIDE = 4


def tiny_llava(transformers, *, layers=4, **text):
    return llava(transformers, layers=layers, **text)[0]


def ask(*, batch=1, before=(5, 6), after=(7, 8, 9), seed=0):
    """The inputs of `batch` images of 4 × 4 tokens between the same words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[*before, *[IMAGE] * SIDE**2, *after]]).expand(batch, -1).contiguous()
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def tiny_qwen2(transformers, *, layers=4):
    """A Qwen2-VL, the image tokens (id 70) each of 2 × 2 patches."""
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, eos_token_id=2, bos_token_id=None, pad_token_id=0,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        ),
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, mlp_ratio=2,
        ),
        image_token_id=70, video_token_id=71, vision_start_token_id=72, vision_end_token_id=73,
    )  # fmt: skip
    return louder(transformers.Qwen2VLForConditionalGeneration(config))


def both(transformers):
    """(model, inputs, grid of image tokens) of each shape."""
    yield tiny_llava(transformers), ask(), (4, 4)
    yield tiny_qwen2(transformers), qwen_inputs(4, 8, [5, 6, 7]), (2, 4)
    yield qwen(transformers, layers=4), qwen_inputs(4, 8, [5, 6, 7]), (2, 4)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@torch.no_grad()
def answers(model, inputs, new=4, **keywords):
    options = {"max_new_tokens": new, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    return model.generate(**inputs, **options, **keywords)[:, inputs["input_ids"].shape[1] :]


def likeliest(model, scores):
    """The token `(B)` that `answers` takes: any but the image's."""
    scores[:, model.config.image_token_id] = -torch.inf
    return scores.argmax(-1)
