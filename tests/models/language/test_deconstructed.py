"""Language models without one property of attention: each lacks exactly that one."""

from __future__ import annotations

import pytest
import torch

from attnlab.models.language.deconstructed import LAYOUTS, SIZES, VARIANTS, Deconstructed
from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.softmax.borrowed import BorrowedMaps

LENGTH = 16


def make(variant, layout="uniform", **keywords) -> Deconstructed:
    torch.manual_seed(0)
    keywords = {"vocabulary": 11, "dim": 24, "depth": 4, "heads": 2, "length": LENGTH} | keywords
    fixed = list(range(11)) * 2 if variant == "fixed_maps" else None
    return Deconstructed(variant=variant, layout=layout, fixed=fixed, **keywords).double().eval()


def ids(n: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 11, (2, n))


def maps(model: Deconstructed, layer: int, text: torch.Tensor) -> torch.Tensor:
    """The attention matrix with which `layer` mixes the values of `text`."""
    found = {}
    mixer = model.blocks[layer].mixer
    real = mixer.mix

    def spy(q, k, v, **keywords):
        units = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
        found["weights"] = real(q, k, units, **keywords)
        return real(q, k, v, **keywords)

    mixer.mix = spy
    model(text)
    mixer.mix = real
    return found["weights"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["uniform", "hybrid"])
def test_all_variants_are_causal_and_stream(variant: str, layout: str) -> None:
    model, text = make(variant, layout), ids()
    full = model(text)
    other = text.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :9], full[:, :9])
    state, out = model.initial_state(2), []
    for piece in text.split([5, 1, 10], 1):
        y, state = model(piece, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), full)


@pytest.mark.parametrize("variant", ["random_maps", "fixed_maps"])
def test_maps_do_not_depend_on_the_text(variant: str) -> None:
    model = make(variant)
    assert torch.equal(maps(model, 2, ids()), maps(model, 2, ids()))


def test_static_maps_depend_on_the_text_but_not_on_the_layers_below() -> None:
    model, text = make("static_maps"), ids()
    before = maps(model, 2, text)
    with torch.no_grad():
        model.blocks[0].mixer.wo.weight.mul_(3)
    assert torch.equal(maps(model, 2, text), before)
    assert not torch.equal(maps(model, 2, ids()), before)


def test_without_mixing_no_token_sees_another() -> None:
    model, text = make("mlp"), ids()
    other = text.clone()
    other[:, 3] = (other[:, 3] + 1) % 11
    same = (model(other) == model(text)).all(-1)
    assert same.sum(1).tolist() == [LENGTH - 1] * 2


def test_the_standard_model_is_the_decoder() -> None:
    model, text = make(None), ids()
    decoder = Decoder(vocabulary=11, dim=24, depth=4, heads=2).double()
    decoder.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(text), decoder(text))


def test_all_variants_have_the_same_parameters() -> None:
    counts = {v: sum(p.numel() for p in make(v).blocks[0].mixer.parameters()) for v in (None, *VARIANTS)}
    assert set(counts.values()) == {4 * 24**2}


def test_gradients_flow_through_the_sequence_beside_the_text() -> None:
    model = make("random_maps")
    model(ids()).sum().backward()
    # The first layer's values of the random sequence reach the text only through the second layer's maps.
    first = model.blocks[0].mixer
    assert isinstance(first, BorrowedMaps)
    assert first.wqkv.weight.grad.abs().sum() > 0


def test_skipping_is_removing_the_layers() -> None:
    model, text = make("non_approximate", "hybrid"), ids()
    shorter = Decoder(vocabulary=11, dim=24, depth=2, heads=2).double()
    kept = {n: p for n, p in model.state_dict().items() if not n.startswith(("blocks.0.", "blocks.2."))}
    shorter.load_state_dict(
        {n.replace("blocks.1.", "blocks.0.").replace("blocks.3.", "blocks.1."): p for n, p in kept.items()}
    )
    torch.testing.assert_close(model.skip()(text), shorter(text))


@pytest.mark.parametrize(
    ("layout", "standard"),
    [
        ("uniform", []),
        ("hybrid", range(2, 25, 2)),
        ("odd", range(1, 25, 2)),
        ("quarter", range(4, 25, 4)),
        ("top", range(1, 13)),
        ("middle", [*range(1, 7), *range(19, 25)]),
        ("bottom", range(13, 25)),
        ("first", [1]),
        ("last", [24]),
        ("bilateral", [1, 24]),
    ],
)
def test_layouts_have_standard_attention_where_the_papers_table_has_it(layout: str, standard) -> None:
    """Table 11 of the paper, for 24 layers."""
    assert [layer for layer in range(1, 25) if LAYOUTS[layout](layer, 24)] == list(standard)


@pytest.mark.parametrize("layout", ["top", "bilateral"])
def test_skipping_leaves_just_the_standard_layers(layout: str) -> None:
    model = make("mlp", layout).skip()
    kept = [block.mixer for i, block in enumerate(model.blocks) if i not in model.left_out]
    assert [type(mixer).__name__ for mixer in kept] == ["MultiHead"] * 2
    assert model(ids()).shape == (2, LENGTH, 11)


@pytest.mark.parametrize("variant", ["random_maps", "fixed_maps"])
def test_keys_of_the_sequence_beside_are_kept_once_for_a_batch(variant: str) -> None:
    model = make(variant)
    state = model.initial_state(2)
    _, state = model(ids(5), state)
    assert state.layers[1].k.shape == (1, 2, 5, 12) and state.layers[1].v.shape == (2, 2, 5, 12)


@pytest.mark.parametrize("variant", ["non_approximate", "random_maps", None])
def test_norms_of_queries_and_keys_bound_the_scores(variant: str | None) -> None:
    model, text = make(variant, qk_norm=True), ids()
    with torch.no_grad():
        before = model(text)
        for block in model.blocks:
            block.mixer.wqkv.weight[:48] *= 1000  # queries and keys
    torch.testing.assert_close(model(text), before, rtol=1e-3, atol=1e-5)


def test_sizes_are_near_their_names() -> None:
    for name, size in SIZES.items():
        number = name.removeprefix("deconstructed_")
        wanted = float(number[:-1]) * (1e6 if number.endswith("m") else 1e9)
        assert abs(size.params / wanted - 1) < 0.2, name


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="variant"):
        make("none")
    with pytest.raises(ValueError, match="layout"):
        make("mlp", "mixed")
    with pytest.raises(ValueError, match="fixed"):
        Deconstructed(variant="fixed_maps", fixed=[1], vocabulary=11, dim=24, depth=1, heads=2, length=4)
    with pytest.raises(ValueError, match="skip"):
        make("mlp").skip()
    with pytest.raises(ValueError, match="length"):
        make("random_maps")(ids(LENGTH + 1))
