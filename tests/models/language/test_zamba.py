"""Zamba2: beside transformers' network, its shared layers and their adapters, decoding, and longer texts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attnlab.cards import build, describe
from attnlab.hub import load_official
from attnlab.models.language.zamba import Zamba2
from attnlab.nn.cache import numbers
from attnlab.recipes.longmamba import calibrate, longmamba


def make(**keywords) -> Zamba2:
    torch.manual_seed(0)
    model = Zamba2(**{**describe("zamba2").sample, **keywords}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_equals_transformers_after_loading_its_checkpoint(transformers, tmp_path):
    ours = make()
    kinds = ["hybrid" if i in ours.at else "linear_attention" for i in range(5)]
    config = transformers.Zamba2Config(
        hidden_size=32, num_hidden_layers=5, layers_block_type=kinds, intermediate_size=48, mamba_d_state=8,
        n_mamba_heads=4, mamba_ngroups=2, num_mem_blocks=2, use_shared_attention_adapter=True, use_mem_rope=True,
        num_attention_heads=4, adapter_rank=4, vocab_size=64, chunk_size=8,
    )  # fmt: skip
    theirs = transformers.Zamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    path = tmp_path / "model.safetensors"
    # The tied head, and the third hybrid layer's copy of the first shared layer, are left out of files.
    kept = {n: t for n, t in theirs.state_dict().items() if "lm_head" not in n and "4.shared_transformer" not in n}
    save_file({n: t.clone() for n, t in kept.items()}, path)
    load_official(ours, path)
    ids = torch.randint(64, (2, 19))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_layer_between_hears_the_shared_layer_through_its_own_map_alone():
    """With the maps behind the uses at zero, it is a plain Mamba-2 network."""
    model, ids = make(), torch.randint(64, (1, 9))
    plain = build("mamba_lm", vocabulary=64, dim=32, depth=5, mixer="mamba2", states=8, head_dim=16, groups=2,
                  least_step=1e-3).eval()  # fmt: skip
    for use in model.uses:
        nn.init.zeros_(use.out.weight)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith(("shared.", "uses."))})
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids))


def test_only_the_uses_of_shared_layers_keep_something_per_token():
    """Keys and values of 2·C in each of three uses; in 6 of 38 layers of the 1.2B model."""
    model = make()

    def kept(n: int) -> int:
        with torch.no_grad():
            return numbers(model(torch.randint(64, (1, n)), model.initial_state(1))[1])

    assert kept(12) - kept(7) == 5 * 3 * 2 * 2 * 32
    with torch.device("meta"):
        large = build("zamba2_1_2b")
    card = describe("zamba2")
    assert card.state_numbers(large, 1) - card.state_numbers(large, 0) == 6 * 4 * 2048


def test_generates_from_states_what_it_generates_without():
    model, ids = make(), torch.randint(64, (2, 5))
    with_states = model.generate(ids, 6, temperature=0)
    assert torch.equal(with_states, model.generate(ids, 6, temperature=0, cached=False))


def test_longmamba_reads_it_too():
    model = make()
    texts = [torch.randint(64, (1, 64)) for _ in range(2)]
    long = torch.randint(64, (1, 256))
    calibrations = calibrate(model, texts, clamp=0.2, lengths=(64, 128, 256))
    assert set(calibrations) == {f"blocks.{i}.mixer" for i in range(5)}
    plain = model(long)
    with longmamba(model, calibrations, cutoff=-1.0, shortest=100):
        filtered = model(long)
    assert not torch.allclose(filtered, plain)
    assert torch.equal(model(long), plain)


def test_bad_arguments_are_named():
    for keywords, words in (
        (dict(at=(1, 5)), "at must rise"),
        (dict(at=(2, 1)), "at must rise"),
        (dict(shared=4), "shared must lie in 1 to the 3"),
        (dict(heads=3), "heads must divide dim = 64"),
        (dict(least_step=-1.0), "least_step"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**keywords)
    other = make(heads=2)
    with pytest.raises(ValueError, match=r"state belongs to another model: .*heads = 2, not 4"):
        make()(torch.randint(64, (1, 3)), other.initial_state(1))
