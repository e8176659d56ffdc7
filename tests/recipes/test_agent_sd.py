"""AgentSD: merging that is an average and its undoing, agents between queries and keys, and a model left as it was."""

import pytest
import torch
from torch import Tensor, nn

from attnlab.recipes.agent_sd import Phase, agent_attention, agent_sd, match, phase, through_agents


def image(height: int = 6, width: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, height * width, 5, dtype=torch.float64)


def test_merged_tokens_are_means_of_what_fell_to_a_target_and_unmerging_gives_each_its_mean() -> None:
    x = image()
    merging = match(x, (6, 8), removed=20)
    tokens, _ = merging.merge(x)
    assert tokens.shape == (2, 28, 5)
    back = merging.unmerge(tokens)
    for b in range(2):
        groups: dict[int, list[int]] = {int(t): [int(t)] for t in merging.targets}
        for source, target in zip(merging.order[b, :20], merging.target[b, :20], strict=True):
            groups[int(merging.targets[target])].append(int(source))
        for members in groups.values():
            torch.testing.assert_close(back[b, members], x[b, members].mean(0).expand(len(members), -1))
        kept = merging.order[b, 20:]
        assert torch.equal(back[b, kept], x[b, kept])


def test_the_most_similar_sources_are_merged_first() -> None:
    x = image()
    merging = match(x, (6, 8), removed=5)
    unit = torch.nn.functional.normalize(x, dim=-1)
    best = (unit @ unit[:, merging.targets].transpose(1, 2)).amax(-1).gather(1, merging.order)
    assert (best.diff(dim=1) <= 1e-12).all()


def test_nothing_removed_means_nothing_changed() -> None:
    x = image()
    merging = match(x, (6, 8), removed=0)
    assert torch.equal(merging.merge(x)[0], x)


@pytest.mark.parametrize("grid", [(6, 8), (7, 9)])
def test_each_whole_cell_keeps_one_token_drawn_by_the_generator(grid: tuple[int, int]) -> None:
    x = image(*grid)
    drawn = [
        match(x, grid, cell=(2, 3), removed=4, generator=torch.Generator().manual_seed(seed)).targets
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    cells = {(int(t) // grid[1] // 2, int(t) % grid[1] // 3) for t in drawn[0]}
    assert cells == {(i, j) for i in range(grid[0] // 2) for j in range(grid[1] // 3)}


@pytest.mark.parametrize(("agents_removed", "fewer"), [(40, True), (30, False)])
def test_agents_are_used_where_they_are_fewer_than_half(agents_removed: int, fewer: bool) -> None:
    x = image()
    agents = match(x, (6, 8), cell=(3, 4), removed=16, agents_removed=agents_removed).merge(x)[1]
    assert (agents is not None) == fewer
    assert agents is None or agents.shape == (2, 8, 5)


def test_agent_attention_is_two_softmaxes_and_a_shortcut() -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)
    agents = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    read = (agents @ k.transpose(-2, -1) / 2).softmax(-1) @ v
    wanted = (q @ agents.transpose(-2, -1) * 0.5**0.3).softmax(-1) @ read + 0.075 * v
    torch.testing.assert_close(agent_attention(q, k, v, agents), wanted)


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads, self.scale, self.calls = 2, (dim // 2) ** -0.5, []
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        self.calls.append(x.shape[1])
        source = x if encoder_hidden_states is None else encoder_hidden_states
        weights = (self.to_q(x) @ self.to_k(source).transpose(1, 2)).softmax(-1)
        return self.to_out[0](weights @ self.to_v(source))


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(dim), Attention(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x, encoder_hidden_states=None)
        return x + self.attn2(x, encoder_hidden_states=text)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = BasicTransformerBlock(4), BasicTransformerBlock(4)

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        fine = self.fine(sample.flatten(2).transpose(1, 2), text)
        pooled = nn.functional.avg_pool2d(sample, 2).flatten(2).transpose(1, 2)
        return fine.square().mean() + self.coarse(pooled, text).square().mean()


def test_patches_fine_self_attention_alone_and_leaves_the_model_as_it_was() -> None:
    model, sample, text = UNet(), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 4)
    before = model(sample, text)
    with agent_sd(model, Phase(cell=2, ratio=0.5, agent_ratio=0.5)):  # no fewer agents than tokens: plain merging
        merged = model(sample=sample, text=text)
    assert model.fine.attn1.calls == [64, 32]
    assert model.coarse.attn1.calls == [16, 16]
    assert model.fine.attn2.calls == [64, 64]
    with agent_sd(model, Phase(cell=4, ratio=0.4, agent_ratio=0.95)):  # agents: the layer's own forward is not called
        through = model(sample, text)
    assert model.fine.attn1.calls == [64, 32]
    after = model(sample, text)
    assert torch.equal(before, after)
    assert not torch.equal(before, merged)
    assert not torch.equal(merged, through)


@pytest.mark.parametrize("agents", [None, 3])
def test_without_few_enough_agents_it_is_softmax_attention(agents: int | None) -> None:
    layer, x = Attention(4), torch.randn(2, 6, 4)
    q, k, v = (project(x).unflatten(-1, (2, 2)).transpose(1, 2) for project in (layer.to_q, layer.to_k, layer.to_v))
    wanted = layer.to_out[0](((q @ k.transpose(-2, -1) * layer.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))
    given = None if agents is None else torch.randn(2, agents, 4)
    torch.testing.assert_close(through_agents(layer, x, given), wanted)


def test_the_model_is_restored_after_an_error() -> None:
    model = UNet()
    with pytest.raises(RuntimeError, match="stop"), agent_sd(model):
        raise RuntimeError("stop")
    assert "forward" not in vars(model.fine.attn1)
    assert not model._forward_pre_hooks


def test_the_plan_turns_from_agents_to_plain_merging_at_step_20() -> None:
    assert [phase(step).cell for step in (0, 19, 20, 49)] == [4, 4, 2, 2]
    assert phase(0).agent_ratio == 0.95


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="grid"):
        match(image(), (6, 9), removed=1)
    with pytest.raises(ValueError, match="cell"):
        match(image(), (6, 8), cell=(7, 1), removed=1)
    with pytest.raises(ValueError, match="removed"):
        match(image(), (6, 8), removed=-1)
    with pytest.raises(ValueError, match="BasicTransformerBlock"), agent_sd(nn.Linear(2, 2)):
        pass
