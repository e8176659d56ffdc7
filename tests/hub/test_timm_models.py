"""Our backbones under timm's names: logits, maps, heads and facts as timm's own models have them."""

from __future__ import annotations

import pytest
import torch

import attnlab
from attnlab import cards
from attnlab.hub import register_timm
from attnlab.models.flops import named_backbones


@pytest.fixture(scope="module")
def registered(timm):
    names = register_timm()
    assert register_timm() == names  # does no harm
    return names


def test_every_named_size_is_there_with_a_slash_and_with_an_underscore(timm, registered) -> None:
    for name in named_backbones():
        assert {f"attnlab/{name}", f"attnlab_{name}"} <= set(registered)
        assert timm.is_model(f"attnlab/{name}") and timm.is_model(f"attnlab_{name}")
    assert "attnlab_van_b0" in timm.list_models("attnlab_*")


@pytest.mark.parametrize("card", [e.card for e in cards.entries() if e.card.kind is cards.BACKBONE and e.card.sizes],
                         ids=lambda card: card.name)  # fmt: skip
def test_every_backbone_can_be_created_with_classes_and_as_maps(timm, registered, card) -> None:
    size = min(card.sizes, key=lambda name: card.sizes[name].params)
    with torch.device("meta"):
        model = timm.create_model(f"attnlab/{size}", num_classes=7)
        assert model.num_classes == 7 and model.feature_info
        maps = timm.create_model(f"attnlab/{size}", features_only=True)
    info = maps.feature_info
    assert info.channels() == list(maps.network.channels) and info.reduction() == list(maps.network.reductions)
    facts = timm.get_pretrained_cfg(f"attnlab/{size}")
    assert facts.paper_ids == f"arXiv:{card.paper}" and not facts.has_weights and facts.input_size[1] >= 32


@torch.no_grad()
def test_it_is_the_network_itself(timm, registered) -> None:
    images = torch.randn(1, 3, 64, 64)
    model = timm.create_model("attnlab/van_b0", num_classes=5, drop_path_rate=0.1).eval()
    ours = attnlab.build("van_b0", num_classes=5).eval()
    ours.load_state_dict(model.network.state_dict())
    assert torch.equal(model(images), ours(images))
    assert torch.equal(model.forward_features(images), ours.forward_features(images)[-1])
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), ours(images))
    short = timm.create_model("attnlab/focalnet_tiny", features_only=True, out_indices=(1, 3)).eval()
    assert [tuple(m.shape) for m in short(images)] == [(1, 192, 8, 8), (1, 768, 2, 2)]
    assert short.feature_info.channels() == [192, 768] and short.feature_info.reduction() == [8, 32]
    assert short.feature_info.module_name() == ["network.stages.1", "network.stages.3"]


@torch.no_grad()
def test_timms_own_tools_understand_it(timm, registered) -> None:
    model = timm.create_model("attnlab/van_b0", num_classes=5, in_chans=1).eval()
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)
    model.reset_classifier(3)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 3) and model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, model.num_features)


def test_what_cannot_be_done_is_refused_by_name(timm, registered) -> None:
    with pytest.raises(ValueError, match=r"no weights of attnlab/van_b0 are hosted.*load_official"):
        timm.create_model("attnlab/van_b0", pretrained=True)
    with pytest.raises(ValueError, match="takes no window_size"):
        timm.create_model("attnlab/van_b0", window_size=3)
    with pytest.raises(ValueError, match="out_indices goes with features_only"):
        timm.create_model("attnlab/van_b0", out_indices=(1,))
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("attnlab/no_such_net")
    with pytest.raises(ValueError, match="no source prefix"):  # timm's own word for other slashes
        timm.create_model("somebody/resnet18")
