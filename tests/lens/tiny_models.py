"""Small models of transformers with random weights, and the processors that go with them, made without a download."""

from __future__ import annotations

from typing import Any

import torch

WORDS = "what colour is the dog cat left red blue answer question using a single word or phrase write general".split()
WORDS += "description of image USER ASSISTANT : . ? list all objects in this , one yes no big small car tree".split()
SPECIAL = ["<pad>", "<unk>", "<eos>", "<image>", "[CLS]", "[SEP]"]


def tokenizer(transformers: Any, **special: str) -> Any:
    """Words are tokens; `<image>` is id 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {w: i for i, w in enumerate([*SPECIAL, *WORDS])}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        from tokenizers import processors

        plain.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        **special,
    )


def louder(model: Any, std: float = 0.2) -> Any:
    """Weights far enough from zero for attention that is not uniform."""
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=std)
    return model.eval()


def llava(transformers: Any, *, layers: int = 3, **text: Any) -> tuple[Any, Any]:
    """A LLaVA of 4 × 4 image tokens, and its processor."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=2,
            bos_token_id=None,
            pad_token_id=0,
            **text,
        ),
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = louder(transformers.LlavaForConditionalGeneration(config))
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(transformers),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    return model, processor


def picture(seed: int = 0, width: int = 48, height: int = 40) -> Any:
    """A PIL image of noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator).byte().numpy())


def qwen(transformers: Any, *, layers: int = 3) -> Any:
    """A Qwen2.5-VL: image tokens (id 70) stand for 2 × 2 patches of 14 pixels, in a grid that the inputs give."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=80,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters=rope,
            eos_token_id=2,
            bos_token_id=None,
            pad_token_id=0,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=32,
            fullatt_block_indexes=[1],
            window_size=56,
        ),
        image_token_id=70,
        video_token_id=71,
        vision_start_token_id=72,
        vision_end_token_id=73,
    )
    return louder(transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen_inputs(rows: int, columns: int, text: list[int], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """One image of rows × columns patches (even), then the text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[72, *[70] * (rows * columns // 4), 73, *text]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows * columns, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
        "mm_token_type_ids": (ids == 70).long(),
    }


def blip(transformers: Any) -> tuple[Any, Any]:
    """An image-text matcher of 4 × 4 patches and three text layers, and its processor."""
    torch.manual_seed(0)
    config = transformers.BlipConfig(
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=dict(
            vocab_size=64,
            hidden_size=16,
            encoder_hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
        ),
        image_text_hidden_size=8,
    )
    model = louder(transformers.BlipForImageTextRetrieval(config))
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = tokenizer(transformers, cls_token="[CLS]", sep_token="[SEP]")
    return model, transformers.BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), words)


def sam(transformers: Any) -> tuple[Any, Any]:
    """A SAM for images of 64 pixels, and its processor."""
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
            window_size=2,
            global_attn_indexes=[1],
            mlp_dim=32,
            num_pos_feats=8,
        ),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4
        ),
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    model = louder(transformers.SamModel(config))
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    images = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    return model, transformers.SamProcessor(images)
