"""The scan one token at a time: the oracle that the chunked form is compared with, and the decoder."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Walk through the tokens and return every token's output and the state after the last one.

        S ← e^decay_t S                              (decay of shape (…, 1): one number per head; (…, Dk): per channel)
        u_t = v_t, or β_t (v_t − Sᵀ k_t) with beta   (the delta rule writes only what the state does not know yet)
        S ← S + k_t u_tᵀ
        o_t = Sᵀ q_t

    q, k (B, H, N, Dk), v (B, H, N, Dv), decay (B, H, N, 1 or Dk) ≤ 0, beta (B, H, N), state (B, H, Dk, Dv).
    Cost O(N · Dk · Dv) per head, N steps in sequence; training keeps every state.
    """
    outputs = []
    for t in range(q.shape[2]):
        key = k[:, :, t].unsqueeze(-1)
        value = v[:, :, t].unsqueeze(-2)
        if decay is not None:
            state = state * decay[:, :, t].exp().unsqueeze(-1)
        if beta is not None:
            value = beta[:, :, t, None, None] * (value - key.mT @ state)
        state = state + key * value
        outputs.append(q[:, :, t].unsqueeze(-2) @ state)
    return torch.cat(outputs, dim=2) if outputs else v, state
