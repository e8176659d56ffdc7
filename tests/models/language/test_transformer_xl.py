"""The Transformer-XL: equal to its definition segment by segment, and what it remembers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from attnlab.hub.official.rcmha import AutoregressiveModel
from attnlab.models.language.transformer_xl import SIZES, TransformerXL


def make(**keywords) -> TransformerXL:
    torch.manual_seed(0)
    keywords = {"vocabulary": 11, "dim": 12, "depth": 2, "heads": 3, "hidden": 20, "reach": 16, "memory": 5} | keywords
    model = TransformerXL(**keywords).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def ids(n: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 11, (batch, n))


def definition(model: TransformerXL, segments: list[Tensor]) -> list[Tensor]:
    """Logits of each segment by the definition; the mixer alone is taken as it is (its own test is elsewhere)."""
    memory: list[Tensor | None] = [None] * len(model.blocks)
    out = []
    for piece in segments:
        x = model.embedding.weight[piece]
        for i, block in enumerate(model.blocks):
            before, memory[i] = memory[i], x if memory[i] is None else torch.cat((memory[i], x), 1)
            memory[i] = memory[i][:, -model.memory :] if model.memory else None
            n1, n2 = block.norm1, block.norm2
            keys = None if before is None else layer_norm(before, (12,), n1.weight, n1.bias)
            x = x + block.mixer(layer_norm(x, (12,), n1.weight, n1.bias), memory=keys)
            inner = layer_norm(x, (12,), n2.weight, n2.bias) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
            x = x + inner.clamp_min(0) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        x = layer_norm(x, (12,), model.norm.weight, model.norm.bias)
        out.append(x @ model.head.weight.T + model.head.bias)
    return out


@pytest.mark.parametrize("memory", [0, 1, 5, 9])
@pytest.mark.parametrize("taps", [1, 3])
def test_equals_the_definition_over_segments(taps: int, memory: int) -> None:
    model, pieces = make(taps=taps, memory=memory), [ids(4), ids(1), ids(6), ids(3)]
    state = model.initial_state(2)
    for piece, wanted in zip(pieces, definition(model, pieces), strict=True):
        logits, state = model(piece, state)
        torch.testing.assert_close(logits, wanted)
    assert state.length == 14


def test_without_convolution_a_long_memory_gives_what_the_whole_text_gives() -> None:
    model, text = make(taps=1, memory=15), ids(12)
    state, out = model.initial_state(2), []
    for piece in text.split([3, 1, 8], 1):
        logits, state = model(piece, state)
        out.append(logits)
    torch.testing.assert_close(torch.cat(out, 1), model(text))


def test_sees_depth_times_memory_tokens_back_and_no_further() -> None:
    model, text = make(taps=1, memory=3), ids(12, 1)
    rows = []
    for changed in range(12):
        other = text.clone()
        other[:, changed] = (other[:, changed] + 1) % 11
        state = model.initial_state(1)
        for token in other.split(1, 1):
            logits, state = model(token, state)
        rows.append(logits)
    state = model.initial_state(1)
    for token in text.split(1, 1):
        logits, state = model(token, state)
    assert [not torch.equal(row, logits) for row in rows] == [False] * 5 + [True] * (2 * 3 + 1)


def test_no_gradient_flows_into_the_memory() -> None:
    model = make()
    state = model.initial_state(2)
    _, state = model(ids(4), state)
    assert all(not m.requires_grad for m in state.layers)
    state.layers = [m.requires_grad_() for m in state.layers]
    model(ids(4), state.clone())[0].sum().backward()
    assert all(m.grad is not None and bool(m.grad.abs().sum() > 0) for m in state.layers[:1])


def test_a_state_can_branch_off() -> None:
    model, first, second = make(), ids(4), ids(4)
    _, state = model(first, model.initial_state(2))
    branch = state.clone()
    model(ids(4), branch)
    _, fresh = model(first, model.initial_state(2))
    assert torch.equal(model(second, state)[0], model(second, fresh)[0])


def test_generates_token_by_token_from_its_memory() -> None:
    model, prompt = make(), ids(4)
    found = model.generate(prompt, 30, temperature=0)  # further than the positions reach
    state, piece = model.initial_state(2), prompt
    for i in range(4, 34):
        logits, state = model(piece, state)
        piece = logits[:, -1:].argmax(-1)
        assert torch.equal(found[:, i : i + 1], piece)


def authors(model: TransformerXL) -> dict[str, Tensor]:
    """A model's parameters under the names and in the shapes of hermansh-id/rcmha."""
    found = {
        "src_embed.weight": model.embedding.weight,
        "generator.weight": model.head.weight,
        "generator.bias": model.head.bias,
        "transformer.norm.weight": model.norm.weight,
        "transformer.norm.bias": model.norm.bias,
    }
    for i, block in enumerate(model.blocks):
        layer, mixer = f"transformer.layers.{i}.", block.mixer
        inner = ".0.linear" if mixer.taps > 1 else ".linear"
        for kind in ("weight", "bias"):
            found[f"{layer}norm_self_attn.{kind}"] = getattr(block.norm1, kind)
            found[f"{layer}norm_ff.{kind}"] = getattr(block.norm2, kind)
            found[f"{layer}feed_forward.layer1.{kind}"] = getattr(block.mlp.fc1, kind)
            found[f"{layer}feed_forward.layer2.{kind}"] = getattr(block.mlp.fc2, kind)
            found[f"{layer}self_attn.output.{kind}"] = getattr(mixer.wo, kind)
        for p, (name, weight) in enumerate(zip(("query", "key", "value"), mixer.wqkv.weight.chunk(3), strict=True)):
            found[f"{layer}self_attn.{name}{inner}.weight"] = weight
            if mixer.taps > 1:
                found[f"{layer}self_attn.{name}.1.conv.weight"] = mixer.taps_weight[:, p, 0].T[:, None]
                found[f"{layer}self_attn.{name}.1.conv.bias"] = mixer.taps_bias[p, 0]
        found[f"{layer}self_attn.value{inner}.bias"] = mixer.value_bias
        found[f"{layer}self_attn.key_pos_embeddings"] = mixer.distance_key
        found[f"{layer}self_attn.key_pos_bias"] = mixer.distance_bias
        found[f"{layer}self_attn.query_pos_bias"] = mixer.query_bias[:, 0]
    return found


@pytest.mark.parametrize("taps", [1, 3])
def test_reads_the_authors_checkpoints(taps: int) -> None:
    model, text = make(taps=taps).float(), ids(6)
    read = AutoregressiveModel.build({"mem_len": 5}, authors(model)).eval()
    state, other = model.initial_state(2), [torch.randn(4, 2, 12) for _ in range(2)]
    state.layers = [m.transpose(0, 1) for m in other]
    found = AutoregressiveModel.run(read, {"x": text.T, "mem.0": other[0], "mem.1": other[1]})
    torch.testing.assert_close(found["y"].transpose(0, 1), model(text, state)[0])
    assert found["mem.1"].shape == (5, 2, 12)


def test_sizes_follow_the_authors_widths() -> None:
    """Six layers of attention 4C² + 2C, tables 2·4096·(C + h) + C, filters 3·4d, norms 4C, mlp 2CF + F + C."""
    c, h, f, v = 128, 8, 256, 65
    layer = 4 * c**2 + 2 * c + 2 * 4096 * (c + h) + c + 4 * c + 2 * c * f + f + c
    around = 2 * c + 2 * v * c + v
    assert SIZES["rmha_char"].params == 6 * layer + around
    assert SIZES["rcmha_char"].params == 6 * (layer + 12 * c // h) + around


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"memory must lie in 0 to reach − 1 = 15, got 16"):
        make(memory=16)
    model = make()
    with pytest.raises(ValueError, match="at most reach = 16 tokens"):
        model(ids(17))
    _, state = model(ids(5), model.initial_state(2))
    with pytest.raises(ValueError, match="at most reach = 16 tokens"):
        model(ids(12), state)
    with pytest.raises(ValueError, match="state belongs to another model"):
        make(depth=1)(ids(3), state)
    with pytest.raises(ValueError, match="batch of 2, got ids of 3"):
        model(ids(3, 3), state)


def test_dropout_is_for_training_alone() -> None:
    model, text = make(dropout=0.5), ids(6)
    assert torch.equal(model(text), model(text))
    model.train()
    assert not torch.equal(model(text), model(text))
    assert isinstance(model.blocks[0].dropout, nn.Dropout)
