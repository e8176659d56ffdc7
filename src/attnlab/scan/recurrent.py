"""The scan one token at a time: the oracle that the chunked form is compared with, and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What goes into a scan beside its state: q, k (B, H, N, Dk), v (B, H, N, Dv), decay (B, H, N, 1 or Dk), beta."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None  # its logarithm
    beta: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with `change` made to each one that is given."""
        return Inputs(*(x if x is None else change(x) for x in self))  # type: ignore[arg-type]


def recurrent(inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Walk through the tokens and return every token's output and the state after the last one.

        S ← e^decay_t S                              (decay of shape (…, 1): one number per head; (…, Dk): per channel)
        u_t = v_t, or β_t (v_t − Sᵀ k_t) with beta   (the delta rule writes only what the state does not know yet)
        S ← S + k_t u_tᵀ
        o_t = Sᵀ q_t

    beta (B, H, N, 1), state (B, H, Dk, Dv).
    Cost O(N · Dk · Dv) per head, N steps in sequence; training keeps every state.
    """
    # Cut along time once: taking step t out of the whole at each step would make the backward quadratic in N.
    queries, keys, values = (x.unsqueeze(-2).unbind(2) for x in inputs[:3])
    decays = None if inputs.decay is None else inputs.decay.exp().unsqueeze(-1).unbind(2)
    betas = None if inputs.beta is None else inputs.beta.unsqueeze(-1).unbind(2)
    outputs = []
    for t, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
        if decays is not None:
            state = state * decays[t]
        if betas is not None:
            value = betas[t] * (value - key @ state)
        state = state + key.mT * value
        outputs.append(query @ state)
    return torch.cat(outputs, dim=2) if outputs else inputs.v, state
