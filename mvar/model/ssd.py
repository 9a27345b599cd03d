"""The state-space sum of Mamba-2, in chunks ("Transformers are SSMs", Dao and Gu 2024, section 6), in plain torch.

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T          y_t = state_t C_t + D x_t

Shapes: B batch, L tokens, H heads, P head width, N state, K chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    state_BHPN: Tensor | None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x_BLHP.shape
    Q = min(chunk, length)
    K = -(-length // Q)
    pad = K * Q - length
    if pad:
        x_BLHP = F.pad(x_BLHP, (0, 0, 0, 0, 0, pad))
        dt_BLH = F.pad(dt_BLH, (0, 0, 0, pad))
        B_BLN = F.pad(B_BLN, (0, 0, 0, pad))
        C_BLN = F.pad(C_BLN, (0, 0, 0, pad))
    dtype = x_BLHP.dtype
    acs = (dt_BLH * A_H).unflatten(1, (K, Q)).cumsum(2)  # BKQH
    dt = dt_BLH.unflatten(1, (K, Q))
    x = x_BLHP.unflatten(1, (K, Q))
    Bm = B_BLN.unflatten(1, (K, Q))
    Cm = C_BLN.unflatten(1, (K, Q))
    G = (Cm @ Bm.transpose(-1, -2)).tril().unsqueeze(2)  # BK1QQ
    acs_h = acs.permute(0, 1, 3, 2)
    E = (acs_h.unsqueeze(-1) - acs_h.unsqueeze(-2)).clamp(max=0).exp()
    xdt = (x * dt.unsqueeze(-1)).to(dtype)
    y = (E * G).to(dtype) @ xdt.permute(0, 1, 3, 2, 4)  # BKHQP
    y = y.permute(0, 1, 3, 2, 4)
    total = acs[:, :, -1]  # BKH
    xe = (xdt * (total.unsqueeze(2) - acs).exp().unsqueeze(-1)).to(dtype)
    contrib = (Bm.transpose(-1, -2) @ xe.flatten(3)).to(acs.dtype)  # BKN(HP)
    state = (
        x.new_zeros(batch, contrib.shape[2], heads, width, dtype=acs.dtype)
        if state_BHPN is None
        else state_BHPN.permute(0, 3, 1, 2)
    )
    befores = []
    for c in range(K):
        befores.append(state)
        state = state * total[:, c, None, :, None].exp() + contrib[:, c].unflatten(-1, (heads, width))
    before = torch.stack(befores, 1).flatten(3).to(dtype)
    inter = (Cm @ before).unflatten(-1, (heads, width)) * acs.exp().unsqueeze(-1)
    y = (y + inter).to(dtype).flatten(1, 2)[:, :length]
    return y, state.permute(0, 2, 3, 1)
