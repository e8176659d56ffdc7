"""Local attention in the later denoising steps: equal to dense attention under the mask, text on either side."""

import pytest
import torch
import torch.nn.functional as F

from attnlab import lens
from attnlab.lens.edits.neighborhood import NeighborhoodSteps
from attnlab.patterns import Neighborhood

GRID, TEXT, DIM, HEADS = (6, 8), 5, 16, 2


class Joint(torch.nn.Module):
    """One joint attention over text and image tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(DIM, 3 * DIM)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def allowed(text: int, kernel, stride) -> torch.Tensor:
    """What the edit's docstring says, written out over all pairs."""
    count, near = abs(text), Neighborhood(GRID, kernel, 1, stride).matrix(48)
    mask = torch.ones(48 + count, 48 + count, dtype=torch.bool)
    first = count if text > 0 else 0
    mask[first : first + 48, first : first + 48] = near
    return mask


@pytest.mark.parametrize("text", [0, TEXT, -TEXT])
@torch.no_grad()
def test_the_grid_sees_its_window_and_all_text_and_text_sees_all(text) -> None:
    torch.manual_seed(0)
    model, x = Joint().double(), torch.randn(2, 48 + abs(text), DIM, dtype=torch.float64)
    q, k, v = model.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    mask = allowed(text, (4, 5), (2, 3))
    with lens.steer(model, NeighborhoodSteps(GRID, (4, 5), stride=(2, 3), text=text)), lens.watch(model) as record:
        torch.testing.assert_close(model(x), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert torch.equal(record[0][0, 0] > 0, mask)


@torch.no_grad()
def test_the_first_steps_of_every_generation_attend_in_full() -> None:
    model, x = Joint(), torch.randn(1, 48, DIM)
    dense = model(x)
    with lens.steer(model, NeighborhoodSteps(GRID, 3, steps=4, full=0.25)):
        same = [torch.equal(model(x), dense) for _ in range(8)]
    assert same == [True, False, False, False] * 2
    with lens.steer(model, NeighborhoodSteps(GRID, 3, full=2)):
        same = [torch.equal(model(x), dense) for _ in range(5)]
    assert same == [True, True, False, False, False]
    assert torch.equal(model(x), dense)


@torch.no_grad()
def test_a_window_of_the_whole_grid_changes_nothing() -> None:
    model, x = Joint(), torch.randn(1, 53, DIM)
    dense = model(x)
    with lens.steer(model, NeighborhoodSteps(GRID, GRID, text=-5)):
        torch.testing.assert_close(model(x), dense)


@torch.no_grad()
def test_a_transformer_of_diffusers_with_joint_attention_takes_it(torchvision_schemas) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    flux = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 48, 4), encoder_hidden_states=torch.randn(1, TEXT, 8),
        pooled_projections=torch.randn(1, 8), timestep=torch.tensor([0.5]), img_ids=torch.randn(48, 3),
        txt_ids=torch.zeros(TEXT, 3),
    )  # fmt: skip
    dense = flux(**inputs).sample
    with lens.steer(flux, NeighborhoodSteps(GRID, GRID, text=TEXT)):
        torch.testing.assert_close(flux(**inputs).sample, dense, atol=1e-5, rtol=1e-5)
    with lens.steer(flux, NeighborhoodSteps(GRID, 3, text=TEXT)), lens.watch(flux) as record:
        assert not torch.allclose(flux(**inputs).sample, dense, atol=1e-4)
    assert all(torch.equal(record[i][0, 0] > 0, allowed(TEXT, 3, 1)) for i in (0, 1))


def test_longer_strides_gain_more_and_the_end_to_end_bound_is_amdahls() -> None:
    flux = [NeighborhoodSteps((256, 256), 80, stride=s, steps=28) for s in (1, 16)]
    assert [round(e.speedup((16, 16), (16, 8)).reachable, 2) for e in flux] == [7.06, 10.24]
    assert flux[1].speedup((16, 16), (16, 8)).perfect
    gained = [e.bound(0.6, (16, 16), (16, 8)) for e in flux]
    assert gained[1] > gained[0]
    assert gained[1] == pytest.approx(1 / (1 - 0.6 * 0.75 * (1 - 1 / 10.24)))  # 21 of 28 steps


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="stride must be at most kernel"):
        NeighborhoodSteps(GRID, 3, stride=4)
    with pytest.raises(ValueError, match=r"full must be a share in \[0, 1\]"):
        NeighborhoodSteps(GRID, 3, steps=10, full=3)
    model = Joint()
    with (
        pytest.raises(ValueError, match=r"text tokens are 48, .* has 50"),
        lens.steer(model, NeighborhoodSteps(GRID, 3)),
    ):
        model(torch.randn(1, 50, DIM))
