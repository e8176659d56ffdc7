"""The sink metric: closed forms, what it is divided by, and any model measured as its own maps say."""

from __future__ import annotations

import pytest
import torch

from attnlab import build
from attnlab.lens.measures.sinks import head_norms, hidden_norms, importance, row_shares, sink_rate
from attnlab.lens.sinks import measure_sinks


def uniform(size: int) -> torch.Tensor:
    return torch.ones(size, size).double().tril() / torch.arange(1, size + 1)[:, None]


def test_uniform_attention_gives_a_harmonic_sum() -> None:
    found = importance(uniform(64))
    for k in (0, 5, 63):
        wanted = sum(1 / (q + 1) for q in range(k, 64)) / (64 - k)
        assert found[k].item() == pytest.approx(wanted)
    assert found[0].item() == pytest.approx(4.7438909 / 64)  # the 64th harmonic number


def test_all_on_the_first_token_is_a_sink_there_and_nowhere_else() -> None:
    weights = torch.zeros(3, 2, 4, 12, 12)
    weights[..., 0] = 1.0
    assert sink_rate(weights).tolist() == [100.0] + [0.0] * 11
    weights[1:, :, 1:] = uniform(12).float()
    # One sample whole and one head of four in the other two.
    assert sink_rate(weights)[0].item() == pytest.approx(100 * (4 + 1 + 1) / 12)


def test_a_key_is_judged_by_the_queries_that_see_it() -> None:
    weights = torch.zeros(8, 8)
    weights[6:, 6] = 1.0
    assert importance(weights)[6].item() == 1.0
    assert importance(torch.eye(8))[7].item() == 1.0  # why the last positions are not judged


def test_shares_of_rows_find_the_largest_of_tiny_weights() -> None:
    weights = 1e-3 * torch.eye(6) + 1e-2 * torch.nn.functional.one_hot(torch.zeros(6, dtype=torch.long), 6)
    assert sink_rate(weights[None])[0] == 0.0
    assert sink_rate(row_shares(-weights[None]))[0] == 100.0
    torch.testing.assert_close(row_shares(weights).sum(-1), torch.ones(6), rtol=1e-4, atol=0)


def test_norms_are_means_over_samples_and_heads() -> None:
    hidden, heads = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 4, 5, 7)
    assert hidden_norms(hidden)[1, 2].item() == pytest.approx(sum(hidden[s, 1, 2].norm().item() for s in range(3)) / 3)
    each = [heads[s, 0, h, 4].norm().item() for s in range(3) for h in range(4)]
    assert head_norms(heads)[0, 4].item() == pytest.approx(sum(each) / 12)


def test_a_model_of_transformers_is_measured_as_by_its_own_maps(transformers) -> None:
    shape = dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    eager, model = (
        transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**shape), attn_implementation=how).eval()
        for how in ("eager", "sdpa")
    )
    for p in eager.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.load_state_dict(eager.state_dict())
    ids = torch.randint(64, (6, 20))
    with torch.no_grad():
        out = eager(ids, output_attentions=True, output_hidden_states=True)
    maps = torch.stack(out.attentions, 1)
    found = measure_sinks(model, ids.split(4), epsilon=0.1)
    torch.testing.assert_close(found.rate, sink_rate(maps, 0.1))
    torch.testing.assert_close(found.importance, importance(maps).mean(0))
    assert found.keys.shape == found.values.shape == (2, 20)
    projected = [
        layer.self_attn.v_proj(layer.input_layernorm(x)).unflatten(-1, (2, 8)).transpose(1, 2)
        for layer, x in zip(eager.model.layers, out.hidden_states, strict=False)
    ]
    torch.testing.assert_close(found.values, head_norms(torch.stack(projected, 1)))


@pytest.mark.parametrize("mixer", ["multihead", "kv_bias", "similarity"])
def test_our_models_are_measured_too_a_slot_first(mixer: str) -> None:
    options = dict(normalise=True) if mixer == "similarity" else {}
    model = build("sink_lm", vocabulary=32, dim=32, depth=2, heads=4, mixer=mixer, mixer_options=options).eval()
    ids = torch.randint(32, (2, 10))
    found = measure_sinks(model, ids)
    with torch.no_grad():
        x = model.embedding(ids)
        for layer, block in enumerate(model.blocks):
            weights = block.mixer.weights(block.norm1(x))
            x = block(x)
            at = int(mixer == "kv_bias")
            torch.testing.assert_close(found.importance[layer, :, at:], importance(weights).mean(0))
    assert found.importance.shape == (2, 4, 10 + at)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="square"):
        sink_rate(torch.rand(3, 4))
    with pytest.raises(ValueError, match="epsilon"):
        sink_rate(torch.rand(4, 4), -1.0)
    with pytest.raises(ValueError, match="samples, layers, heads"):
        head_norms(torch.rand(3, 4, 5))
    model = build("sink_lm", vocabulary=32, dim=32, depth=1, heads=4)
    with pytest.raises(ValueError, match="one length"):
        measure_sinks(model, [torch.randint(32, (1, 5)), torch.randint(32, (1, 6))])
