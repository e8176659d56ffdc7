"""Reinforcement learning of language models with credit per token: group advantages, shaped, in a clipped objective."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.cards import RECIPE, Card, register


def group_advantages(rewards: Tensor, *, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage of each of a prompt's answers, `(…, G)` → the same: (r − mean) / (std + eps) over the group.

    Where all answers earn the same, there is nothing to learn: zeros. Source: arXiv 2402.03300.
    """
    if rewards.dim() < 1 or rewards.shape[-1] < 2:
        raise ValueError(f"rewards must be those of two answers or more, (…, G), got {tuple(rewards.shape)}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + eps)


def shape_advantages(advantages: Tensor, multipliers: Tensor) -> Tensor:
    """Advantages `(B)` or `(B, n)` times the multipliers `(B, n)` of their tokens, where not negative: `(B, n)`.

    What went wrong is not blamed on the tokens that mattered most. No gradient flows into either.
    """
    if multipliers.dim() != 2:
        raise ValueError(f"multipliers must be (B, n), got {tuple(multipliers.shape)}")
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.detach()
    return torch.where(advantages >= 0, advantages * multipliers.detach(), advantages).expand(multipliers.shape)


@register(
    Card(
        name="token_credit",
        title="Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy "
        "Optimization",
        paper="2510.13554",
        system="preplan_anchor",
        family="reinforcement",
        kind=RECIPE,
        cost="n",
    )
)
def clipped_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, multipliers: Tensor | None = None, clip: float = 0.2
) -> Tensor:
    """The clipped objective of PPO and GRPO, with the advantage of each token shaped if `multipliers` are given.

        loss = −mean over answers of 1/|o| Σ_t min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t)        ρ_t = exp(logp_t − old_t)
        Â_t = A γ_t where A ≥ 0, else A

    Multipliers of 1 give the plain loss bit for bit. No penalty of divergence and no bonus of entropy, as in the paper.
    Multipliers come of a model's attention by `lens.measures.anchors` (`multipliers`) or `lens.reasoning` (`credit`).
    Source: arXiv 2510.13554.

    Args:
        logp, old: log-probabilities `(B, n)` of the answers' tokens, under the policy and the one that wrote them.
        advantages: `(B)`, of each answer, or `(B, n)`.
        mask: bool `(B, n)`, which places hold tokens of an answer.
        multipliers: γ `(B, n)`.
        clip: ε.
    """
    if logp.dim() != 2 or logp.shape != old.shape or logp.shape != mask.shape:
        raise ValueError(
            f"logp, old and mask must be (B, n), got {tuple(logp.shape)}, {tuple(old.shape)} and {tuple(mask.shape)}"
        )
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    if not bool(mask.any(-1).all()):
        raise ValueError("mask must leave a token of each answer")
    gamma = torch.ones_like(logp) if multipliers is None else multipliers.to(logp)
    shaped = shape_advantages(advantages, gamma)
    # Where there is no token a ratio of 1 keeps what is not counted finite.
    ratio = (logp - old.detach()).masked_fill(~mask, 0.0).exp()
    gain = torch.minimum(ratio * shaped, ratio.clamp(1 - clip, 1 + clip) * shaped)
    return -((gain * mask).sum(-1) / mask.sum(-1)).mean()
