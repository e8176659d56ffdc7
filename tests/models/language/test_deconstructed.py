"""Language models without one property of attention: each lacks exactly that one."""

from __future__ import annotations

import pytest
import torch

from attnlab.models.language.deconstructed import VARIANTS, Deconstructed
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
