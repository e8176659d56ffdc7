"""Heads taken away: uniformly by a query of zero or by hand, wholly, and only while decoding."""

from __future__ import annotations

import pytest
import torch

from attnlab import build
from attnlab.lens.edits.heads_off import HeadsOff
from attnlab.lens.steer import Edit, steer


def ours(**keywords):
    torch.manual_seed(0)
    return build(
        "llama", **{"vocabulary": 40, "dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 48, **keywords}
    ).eval()


IDS = torch.arange(18).view(2, 9) * 7 % 40


class ZeroQuery(Edit):
    """The authors' way: a query of zero, whose scores are all alike."""

    def before(self, event) -> None:
        if event.layer == 1:
            event.q = event.q.clone()
            event.q[:, [0, 3]] = 0.0


@torch.no_grad()
def logits(model, *edits) -> torch.Tensor:
    with steer(model, list(edits)):
        return model(IDS)


def test_uniform_is_a_query_of_zero() -> None:
    model = ours()
    found = logits(model, HeadsOff([(1, 0), (1, 3)], steps=None))
    torch.testing.assert_close(found, logits(model, ZeroQuery()))
    assert not torch.allclose(found, logits(model))


def test_uniform_is_uniform_whatever_the_position_adds() -> None:
    model = ours(position="alibi", depth=1)
    with torch.no_grad():
        block = model.blocks[0]
        v = block.mixer.project(block.norm1(model.embedding(IDS)))[2].repeat_interleave(2, 1)
        mean = v.cumsum(2) / torch.arange(1, 10)[:, None]
    seen = []

    class Look(Edit):
        def after(self, event, out) -> None:
            seen.append(out)

    logits(model, HeadsOff([(0, 2)], steps=None), Look())
    torch.testing.assert_close(seen[0][:, 2], mean[:, 2])


def test_zero_is_without_the_heads_columns_of_the_output_projection() -> None:
    model, other = ours(), ours()
    with torch.no_grad():
        other.blocks[0].mixer.wo.weight[:, 8:16] = 0
    torch.testing.assert_close(logits(model, HeadsOff([(0, 1)], "zero", steps=None)), logits(other))


@torch.no_grad()
def test_the_prompt_is_read_with_all_heads_and_the_model_is_left_as_it_was() -> None:
    model = ours()
    before, state = model(IDS), model.initial_state(2)
    with steer(model, HeadsOff([(1, 0)], "zero")):
        first, state = model(IDS[:, :8], state)
        last, _ = model(IDS[:, 8:], state)
    torch.testing.assert_close(first, before[:, :8])
    assert not torch.allclose(last, before[:, 8:])
    assert torch.equal(model(IDS), before)


def test_bad_input_is_named() -> None:
    model = ours()
    with pytest.raises(ValueError, match="style must be"):
        HeadsOff([(0, 0)], "mean")
    with pytest.raises(ValueError, match="counted from 0"):
        HeadsOff([(-1, 0)])
    with pytest.raises(ValueError, match="are 0 to 3, got 4"):
        logits(model, HeadsOff([(1, 4)], steps=None))
    with pytest.raises(ValueError, match="7"):
        logits(model, HeadsOff([(7, 0)], steps=None))
