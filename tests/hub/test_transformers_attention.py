"""`attn_implementation="attnlab"`: without a pattern a model is what it was; with one, every way to run it agrees."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from attnlab.hub import register_transformers
from attnlab.hub.transformers_attention import HostMask

GREEDY = dict(max_new_tokens=12, do_sample=False)
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.2,
)  # fmt: skip
DECODER = dict(SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None)


@pytest.fixture(scope="module")
def hf(transformers):
    register_transformers()
    register_transformers()  # does no harm
    return transformers


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 64, (3, 50))


@pytest.fixture
def padding(ids) -> torch.Tensor:
    """Texts of 43, 30 and 50 tokens, padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :20] = 0, 0
    return mask


def twins(hf, config, kind: str = "AutoModelForCausalLM"):
    """One model under torch's attention and under ours."""
    make = getattr(hf, kind).from_config
    theirs, ours = (make(copy.deepcopy(config), attn_implementation=n).eval() for n in ("sdpa", "attnlab"))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(("name", "more"), [("Llama", {}), ("Qwen3", {}), ("Mistral", {"sliding_window": 8})])
@torch.no_grad()
def test_without_a_pattern_a_decoder_is_what_it_was(hf, ids, padding, name, more) -> None:
    theirs, ours = twins(hf, getattr(hf, f"{name}Config")(**DECODER, **more))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    ours_padded, theirs_padded = (m(ids, attention_mask=padding).logits[padding.bool()] for m in (ours, theirs))
    torch.testing.assert_close(ours_padded, theirs_padded, atol=1e-5, rtol=1e-5)
    for mask in (None, padding):
        for cache in ({}, {"cache_implementation": "static"}):
            wanted = theirs.generate(ids, attention_mask=mask, **GREEDY, **cache)
            assert torch.equal(ours.generate(ids, attention_mask=mask, **GREEDY, **cache), wanted)


@torch.no_grad()
def test_without_a_pattern_an_encoder_is_what_it_was(hf, ids, padding) -> None:
    theirs, ours = twins(hf, hf.BertConfig(**SIZES), "AutoModel")
    for mask in (None, padding, padding.flip(1)):
        a, b = (m(ids, attention_mask=mask).last_hidden_state for m in (theirs, ours))
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_untouched_model(hf, ids) -> None:
    theirs, ours = twins(hf, hf.LlamaConfig(**DECODER))
    for model in (theirs, ours):
        model.train()(ids, labels=ids).loss.backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=lambda m, name=name: f"{name}: {m}", atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_causal_window_is_the_sliding_window_of_transformers(hf, ids, padding) -> None:
    theirs, _ = twins(hf, hf.MistralConfig(**DECODER, sliding_window=8))
    config = hf.MistralConfig(**DECODER, sliding_window=None)
    config.attnlab_pattern = "Window(8)"
    _, ours = twins(hf, config)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    wanted = theirs.generate(ids, attention_mask=padding, **GREEDY)
    assert torch.equal(ours.generate(ids, attention_mask=padding, **GREEDY), wanted)


@pytest.mark.parametrize(
    "pattern",
    ["PowersOfTwo(block=4, window=1, sinks=1)", "Window(6) | (Sinks(2) & Causal())", {"name": "Window", "size": 5},
     ["Window(4)", None]],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_caches_batches_and_the_whole_text_at_once_agree_under_a_pattern(hf, ids, padding, pattern) -> None:
    config = hf.LlamaConfig(**DECODER)
    config.attnlab_pattern = pattern
    _, model = twins(hf, config)
    found = model.generate(ids, attention_mask=padding, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=padding, cache_implementation="static", **GREEDY), found)
    assert torch.equal(model.generate(ids, attention_mask=padding, use_cache=False, **GREEDY), found)
    # Positions count from the first real token: padding changes nothing.
    alone = [model.generate(row[mask.bool()][None], **GREEDY)[0, -12:] for row, mask in zip(ids, padding, strict=True)]
    assert torch.equal(found[:, -12:], torch.stack(alone))
    assert torch.equal(model.generate(ids, num_beams=1, **GREEDY)[2], found[2])
    seen = torch.cat([padding, padding.new_ones(3, 12)], 1)
    assert torch.equal(model(found, attention_mask=seen).logits[:, 49:-1].argmax(-1), found[:, 50:])


@torch.no_grad()
def test_a_prompt_read_in_pieces_is_the_prompt(hf, ids, padding) -> None:
    config = hf.LlamaConfig(**DECODER)
    config.attnlab_pattern = "PowersOfTwo(block=4, window=1, sinks=1)"
    _, model = twins(hf, config)
    for mask in (torch.ones_like(padding), padding):
        whole = model(ids, attention_mask=mask).logits
        cache = model(ids[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
        rest = model(ids[:, 12:], attention_mask=mask, past_key_values=cache).logits
        real = mask[:, 12:].bool()
        torch.testing.assert_close(rest[real], whole[:, 12:][real], atol=1e-5, rtol=1e-5)


def test_a_route_reads_the_prompt_and_the_rest_sees_all(hf) -> None:
    config = hf.LlamaConfig(**DECODER, max_position_embeddings=512)
    config.attnlab_pattern = "ProxyHeads(0.5, block=16, stride=2, minimum=16)"
    theirs, ours = twins(hf, config)
    ids = torch.randint(1, 64, (1, 200))
    with torch.no_grad():
        assert not torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-3)
        config.attnlab_pattern = "ProxyHeads(1.0, block=16, stride=2, minimum=16)"
        _, all_of_it = twins(hf, config)
        all_of_it.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(all_of_it(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert ours.generate(ids, **GREEDY).shape == (1, 212)


def test_the_pattern_is_saved_with_the_config(hf, tmp_path) -> None:
    config = hf.LlamaConfig(**DECODER)
    config.attnlab_pattern = {"name": "PowersOfTwo", "block": 64}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attnlab_pattern"] == config.attnlab_pattern
    assert hf.AutoConfig.from_pretrained(tmp_path).attnlab_pattern == config.attnlab_pattern


def test_whoever_looks_at_the_mask_gets_it(hf) -> None:
    from attnlab.hub.transformers_attention import mask

    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    made = mask(2, 5, 5, attention_mask=real)
    assert isinstance(made, HostMask) and made.shape == (2, 1, 5, 5) and made.dtype == torch.bool
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.equal(made & True, (causal & real[:, None])[:, None])


def test_what_cannot_be_done_is_refused_by_name(hf, ids) -> None:
    def run(config, kind="AutoModelForCausalLM"):
        return getattr(hf, kind).from_config(config, attn_implementation="attnlab")(ids)

    for pattern, error, words in [
        ("Window(", ValueError, "does not spell a pattern"),
        ("Neighborhood((8, 8), 3)", ValueError, "holds 64 tokens"),
        ("Neighborhood((3, 3), 3)", ValueError, "holds 9 tokens"),
        (3, TypeError, "must be text"),
        (["Window(4)"], ValueError, "none for layer 1"),
    ]:
        config = hf.LlamaConfig(**DECODER)
        config.attnlab_pattern = pattern
        with pytest.raises(error, match=words):
            run(config)
    gemma = hf.Gemma2Config(**DECODER, head_dim=8, sliding_window=8)
    with pytest.raises(ValueError, match="softcap"):
        run(gemma)
