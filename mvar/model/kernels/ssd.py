"""The state-space sum of Mamba-2 in chunks of tokens, in plain torch ("Transformers are SSMs", Dao and Gu 2024, §6).

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T          y_t = state_t C_t + D x_t

Inside a chunk the sum is a lower-triangular matrix for each head; between chunks only the state travels. With s the
running sum of dt A inside a chunk and S the state before it:

    y_i  = sum_{j<=i} (C_i.B_j) exp(s_i - s_j) dt_j x_j  +  D x_i  +  exp(s_i) S C_i
    S'   = exp(s_last) S  +  sum_j exp(s_last - s_j) dt_j x_j B_j^T

The backward pass is written by hand: it recomputes the matrices, so that nothing of size Q x Q is stored for a head.
Chunks are worked off a few at a time, so that what one step writes is still in the cache when the next step reads it.

Shapes: B batch, L tokens, H heads, P head width, N state; R chunks of all images, K of one, G of a block; Q tokens
of a chunk. Decays, step sizes and the travelling state are wide (float32 or float64); products run in x's dtype, or in
float32 on a CPU that cannot multiply that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvar.model.kernels.arithmetic import running_sum
from mvar.model.kernels.blocking import runs
from mvar.model.kernels.precision import product_dtype, wide

CHUNK = 64
"""Tokens of a chunk, about: with as many channels of a head and of the state, all products cost the same."""
CHUNK_MIN, CHUNK_MAX = 40, 96
"""Bounds within which a divisor of the length is looked for."""
WHOLE = 128
"""Sequences up to this length are one chunk: without a state to carry that is faster, whatever the length."""
TINY = 1e-30


def chunk_length(length: int) -> int:
    """Tokens of a chunk for a sequence of `length`: a divisor near CHUNK if there is one, so that nothing is padded."""
    if length <= WHOLE:
        return length
    divisors = [q for q in range(CHUNK_MIN, CHUNK_MAX + 1) if length % q == 0]
    if divisors:
        return min(divisors, key=lambda q: abs(q - CHUNK))
    return -(-length // round(length / CHUNK))


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    *,
    final: bool = True,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y (B, L, H, P) in x's dtype and, if `final`, the wide state (B, H, P, N) after the last token.

    `dt_BLH` positive and `A_H` negative, both wide; `state_BHPN`: the state before the first token, zeros if None.
    """
    length = x_BLHP.shape[1]
    chunk = chunk_length(length) if chunk is None else min(chunk, length)
    pad = -length % chunk
    if pad:  # tokens with dt = 0 leave the state alone
        x_BLHP = F.pad(x_BLHP, (0, 0, 0, 0, 0, pad))
        dt_BLH, B_BLN, C_BLN = (F.pad(t, (0, 0, 0, pad)) for t in (dt_BLH, B_BLN, C_BLN))
    results = _ChunkedSum.apply(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, state_BHPN, final, chunk)  # type: ignore[no-untyped-call]
    y_BLHP, final_BHPN = results
    return y_BLHP[:, :length], final_BHPN


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLHP: Tensor,
        dt_BLH: Tensor,
        A_H: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        D_H: Tensor,
        state_BHPN: Tensor | None,
        final: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = x_BLHP.dtype
        chunks = _Chunks.of(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, chunk)
        x_RQHP, C_RQN = chunks.x_RQHP, chunks.C_RQN
        before_RNX = final_BHPN = None
        if final or state_BHPN is not None or chunk < x_BLHP.shape[1]:
            before_RNX, final_BHPN = _travel(chunks.gains(), chunks.whole_RH, state_BHPN, x_BLHP.shape[0])

        y_RQHP = torch.empty(x_RQHP.shape, dtype=x_RQHP.dtype, device=x_RQHP.device)
        for rows in chunks.blocks():
            mix_GHQQ, _ = chunks.mix(rows)
            y_GQHP = torch.matmul(mix_GHQQ, x_RQHP[rows].transpose(1, 2)).transpose(1, 2)
            if before_RNX is None:
                y_RQHP[rows] = y_GQHP
            else:
                seen_GQHP = torch.bmm(C_RQN[rows], before_RNX[rows]).view(y_GQHP.shape)
                torch.addcmul(y_GQHP, seen_GQHP, chunks.into_RQH1[rows], out=y_RQHP[rows])
        kept_RNX = None if before_RNX is None else before_RNX.to(dtype)
        ctx.save_for_backward(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, kept_RNX)
        ctx.chunk, ctx.has_state = chunk, state_BHPN is not None
        ctx.set_materialize_grads(False)
        return y_RQHP.view(x_BLHP.shape).to(dtype), final_BHPN if final else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHP: Tensor | None, dfinal_BHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, before_RNX = ctx.saved_tensors
        chunks = _Chunks.of(x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, D_H, ctx.chunk)
        x_RQHP, B_RQN, C_RQN = chunks.x_RQHP, chunks.B_RQN, chunks.C_RQN
        dtype, wider = x_RQHP.dtype, wide(x_RQHP.dtype)
        dy_RQHP = torch.zeros_like(x_RQHP) if dy_BLHP is None else dy_BLHP.reshape(x_RQHP.shape).to(dtype)
        before_RNX = None if before_RNX is None else before_RNX.to(dtype)

        # Gradients of s and of log dt, the latter only where dt scales what a token sends.
        dsum_RQH, sent_RQH = torch.zeros_like(chunks.sum_RQH), torch.zeros_like(chunks.sum_RQH)
        dB_RQN = torch.zeros(B_RQN.shape, dtype=wider, device=B_RQN.device)
        dC_RQN = torch.zeros_like(dB_RQN)
        dD_H = torch.zeros(x_RQHP.shape[2], dtype=wider, device=x_RQHP.device)
        dx_RQHP = torch.empty(x_RQHP.shape, dtype=dtype, device=x_RQHP.device)

        # The state's way back: from what tokens saw of it, and from the state after it.
        dbefore_RNX: Tensor | None = None
        if before_RNX is not None:
            dbefore_RNX = torch.empty_like(before_RNX)
            for rows in chunks.blocks():
                dseen_GQHP = dy_RQHP[rows] * chunks.into_RQH1[rows]
                dseen_GQX = dseen_GQHP.flatten(2)
                torch.bmm(C_RQN[rows].transpose(1, 2), dseen_GQX, out=dbefore_RNX[rows])
                dC_RQN[rows] += torch.bmm(dseen_GQX, before_RNX[rows].transpose(1, 2))
                seen_GQHP = torch.bmm(C_RQN[rows], before_RNX[rows]).view(dseen_GQHP.shape)
                dsum_RQH[rows] += seen_GQHP.mul_(dseen_GQHP).sum(-1, dtype=wider)
        back: _StateGradients | None = None
        if dbefore_RNX is not None or dfinal_BHPN is not None:
            back = _travel_back(chunks, before_RNX, dbefore_RNX, dfinal_BHPN, x_BLHP.shape[0])
            dsum_RQH[:, -1] += back.dwhole_RH

        dproducts_RQQ = torch.empty_like(chunks.products_RQQ)
        for rows in chunks.blocks():
            mix_GHQQ, decay_GHQQ = chunks.mix(rows)
            dy_GHQP = dy_RQHP[rows].transpose(1, 2).contiguous()
            x_GHQP = x_RQHP[rows].transpose(1, 2).contiguous()
            dx_GQHP = torch.matmul(mix_GHQQ.transpose(-1, -2), dy_GHQP).transpose(1, 2)
            dmix_GHQQ = torch.matmul(dy_GHQP, x_GHQP.transpose(-1, -2), out=mix_GHQQ)
            dD_H += dmix_GHQQ.diagonal(dim1=-2, dim2=-1).sum((0, 2), dtype=wider)
            dmix_GHQQ.mul_(decay_GHQQ)
            torch.sum(dmix_GHQQ, dim=1, out=dproducts_RQQ[rows])
            dmix_GHQQ.mul_(chunks.products_RQQ[rows].unsqueeze(1))
            # The same numbers are added to s_i and taken from s_j, so what cancels in the running sum does so exactly.
            sent_GQH = dmix_GHQQ.sum(-2, dtype=wider).transpose(1, 2)
            dsum_RQH[rows] += dmix_GHQQ.sum(-1, dtype=wider).transpose(1, 2) - sent_GQH
            sent_RQH[rows] += sent_GQH
            if back is None:
                dx_RQHP[rows] = dx_GQHP
                continue
            dafter_GNX = back.dafter_RNX[rows]
            dkept_GQHP = torch.bmm(B_RQN[rows], dafter_GNX).view(dx_GQHP.shape)
            kept_GQHP = x_RQHP[rows] * chunks.out_RQH1[rows]
            torch.addcmul(dx_GQHP, dkept_GQHP, chunks.out_RQH1[rows], out=dx_RQHP[rows])
            dB_RQN[rows] += torch.bmm(kept_GQHP.flatten(2), dafter_GNX.transpose(1, 2))
            kept_GQH = kept_GQHP.mul_(dkept_GQHP).sum(-1, dtype=wider)
            sent_RQH[rows] += kept_GQH
            dsum_RQH[rows] -= kept_GQH
            dsum_RQH[rows, -1] += kept_GQH.sum(1)
        dproducts_RQQ.tril_()
        dC_RQN += torch.bmm(dproducts_RQQ, B_RQN)
        dB_RQN += torch.bmm(dproducts_RQQ.transpose(1, 2), C_RQN)

        dlog_RQH = running_sum(dsum_RQH.flip(1), 1).flip(1)  # of dt A
        ddt_RQH = sent_RQH / chunks.dt_RQH.clamp_min(TINY) + dlog_RQH * A_H
        return (
            dx_RQHP.view(x_BLHP.shape).to(x_BLHP.dtype),
            ddt_RQH.view(dt_BLH.shape),
            (dlog_RQH * chunks.dt_RQH).sum((0, 1)),
            dB_RQN.to(B_BLN.dtype).view(B_BLN.shape),
            dC_RQN.to(C_BLN.dtype).view(C_BLN.shape),
            dD_H.to(D_H.dtype),
            back.dinitial_BHPN if back is not None and ctx.has_state else None,
            None,
            None,
        )


@dataclass(frozen=True)
class _Chunks:
    """The inputs cut into chunks, and what both passes make of them. X stands for H*P."""

    x_RQHP: Tensor
    B_RQN: Tensor
    C_RQN: Tensor
    D_1H1: Tensor
    products_RQQ: Tensor
    """C_i.B_j, zero above the diagonal."""
    dt_RQH: Tensor
    sum_RQH: Tensor
    """s, the running sum of dt A."""
    dt_RHQ: Tensor
    to_RHQ: Tensor
    from_RHQ: Tensor
    """s_i, and s_j - log dt_j: their difference is the logarithm of exp(s_i - s_j) dt_j."""
    into_RQH1: Tensor
    """exp(s_i), the share of the state before the chunk that a token sees, in x's dtype."""
    out_RQH1: Tensor
    """exp(s_last - s_j) dt_j, the share of a token in the state after the chunk, in x's dtype."""
    whole_RH: Tensor
    """exp(s_last), the share of the state that survives the chunk."""

    @classmethod
    def of(
        cls, x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_H: Tensor, chunk: int
    ) -> _Chunks:
        heads, width = x_BLHP.shape[2:]
        dtype = product_dtype(x_BLHP.dtype, x_BLHP.device)
        x_BLHP, B_BLN, C_BLN = (t.to(dtype) for t in (x_BLHP, B_BLN, C_BLN))
        B_RQN, C_RQN = B_BLN.reshape(-1, chunk, B_BLN.shape[-1]), C_BLN.reshape(-1, chunk, C_BLN.shape[-1])
        dt_RQH = dt_BLH.reshape(-1, chunk, heads)
        sum_RQH = running_sum(dt_RQH * A_H, 1)
        dt_RHQ, to_RHQ = dt_RQH.transpose(1, 2).contiguous(), sum_RQH.transpose(1, 2).contiguous()
        return cls(
            x_RQHP=x_BLHP.reshape(-1, chunk, heads, width),
            B_RQN=B_RQN,
            C_RQN=C_RQN,
            D_1H1=D_H.to(dtype).view(1, heads, 1),
            products_RQQ=torch.bmm(C_RQN, B_RQN.transpose(1, 2)).tril_(),
            dt_RQH=dt_RQH,
            sum_RQH=sum_RQH,
            dt_RHQ=dt_RHQ,
            to_RHQ=to_RHQ,
            from_RHQ=to_RHQ - dt_RHQ.log(),
            into_RQH1=_exp_(sum_RQH.clone()).to(dtype).unsqueeze(-1),
            out_RQH1=_exp_(sum_RQH[:, -1:] - sum_RQH).mul_(dt_RQH).to(dtype).unsqueeze(-1),
            whole_RH=_exp_(sum_RQH[:, -1].clone()),
        )

    def blocks(self) -> list[slice]:
        """Runs of chunks to work on together."""
        R, Q, heads, _ = self.x_RQHP.shape
        return runs(R, heads * Q * Q, self.x_RQHP.device)

    def mix(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Two (G, H, Q, Q) in x's dtype: the matrix that x is multiplied with, and its decay exp(s_i - s_j) dt_j.

        Above the diagonal the matrix is zero and the decay is finite and meaningless.
        """
        decay_GHQQ = self.to_RHQ[rows].unsqueeze(-1) - self.from_RHQ[rows].unsqueeze(-2)
        _exp_(decay_GHQQ)
        # On and below the diagonal the decay is at most dt, so this changes nothing there.
        torch.minimum(decay_GHQQ, self.dt_RHQ[rows].unsqueeze(-2), out=decay_GHQQ)
        decay_GHQQ = decay_GHQQ.to(self.x_RQHP.dtype)
        mix_GHQQ = decay_GHQQ * self.products_RQQ[rows].unsqueeze(1)
        mix_GHQQ.diagonal(dim1=-2, dim2=-1).add_(self.D_1H1)
        return mix_GHQQ, decay_GHQQ

    def gains(self) -> Tensor:
        """What each chunk adds to the state: (R, N, X) in x's dtype."""
        R, _, heads, width = self.x_RQHP.shape
        gain_RNX = self.x_RQHP.new_empty(R, self.B_RQN.shape[-1], heads * width)
        for rows in self.blocks():
            kept_GQX = (self.x_RQHP[rows] * self.out_RQH1[rows]).flatten(2)
            torch.bmm(self.B_RQN[rows].transpose(1, 2), kept_GQX, out=gain_RNX[rows])
        return gain_RNX


def _exp_(x: Tensor) -> Tensor:
    """exp in place, without denormal and infinite results: they are slow, and infinity times zero is not zero."""
    limit = 0.7 * math.log(torch.finfo(x.dtype).max)
    return x.clamp_(-limit, limit).exp_()


def _travel(gain_RNX: Tensor, whole_RH: Tensor, state_BHPN: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor]:
    """Carry the state over the chunks: the state before each, (R, N, X) in x's dtype, and the last one, wide.

    None instead of states before that are zero for sure.
    """
    heads, N = whole_RH.shape[1], gain_RNX.shape[1]
    gain_BKNHP = gain_RNX.view(batch, -1, N, heads, gain_RNX.shape[-1] // heads)
    whole_BK1H1 = whole_RH.view(batch, -1, 1, heads, 1)
    if state_BHPN is None and gain_BKNHP.shape[1] == 1:
        return None, gain_BKNHP[:, 0].to(whole_RH.dtype).permute(0, 2, 3, 1)
    now_BNHP = torch.zeros(gain_BKNHP[:, 0].shape, dtype=whole_RH.dtype, device=whole_RH.device)
    if state_BHPN is not None:
        now_BNHP.copy_(state_BHPN.permute(0, 3, 1, 2))
    before_BKNHP = torch.empty_like(gain_BKNHP)
    for images in runs(batch, now_BNHP[0].numel(), now_BNHP.device):
        now = now_BNHP[images]
        for k in range(gain_BKNHP.shape[1]):
            before_BKNHP[images, k] = now
            now.mul_(whole_BK1H1[images, k]).add_(gain_BKNHP[images, k])
    return before_BKNHP.view_as(gain_RNX), now_BNHP.permute(0, 2, 3, 1)


class _StateGradients(NamedTuple):
    dafter_RNX: Tensor
    """Of the state after each chunk, in x's dtype."""
    dwhole_RH: Tensor
    """Of s_last, through the state that survives the chunk."""
    dinitial_BHPN: Tensor


def _travel_back(
    chunks: _Chunks, before_RNX: Tensor | None, dbefore_RNX: Tensor | None, dfinal_BHPN: Tensor | None, batch: int
) -> _StateGradients:
    """The reverse of `_travel`. `dbefore`: the gradient of the state before each chunk, through what its tokens saw."""
    whole_RH = chunks.whole_RH
    R, _, heads, width = chunks.x_RQHP.shape
    shape_BKNHP = (batch, R // batch, chunks.B_RQN.shape[-1], heads, width)
    whole_BK1H1 = whole_RH.view(batch, -1, 1, heads, 1)
    now_BNHP = torch.zeros(batch, *shape_BKNHP[2:], dtype=whole_RH.dtype, device=whole_RH.device)
    if dfinal_BHPN is not None:
        now_BNHP.copy_(dfinal_BHPN.permute(0, 3, 1, 2))
    dafter_BKNHP = chunks.x_RQHP.new_empty(shape_BKNHP)
    dwhole_BKH = torch.zeros_like(whole_RH).view(batch, -1, heads)
    for images in runs(batch, now_BNHP[0].numel(), now_BNHP.device):
        now = now_BNHP[images]
        for k in reversed(range(shape_BKNHP[1])):
            dafter_BKNHP[images, k] = now
            now.mul_(whole_BK1H1[images, k])
            if before_RNX is not None and dbefore_RNX is not None:
                dwhole_BKH[images, k] = (now * before_RNX.view(shape_BKNHP)[images, k]).sum((1, 3))
                now.add_(dbefore_RNX.view(shape_BKNHP)[images, k])
    return _StateGradients(
        dafter_BKNHP.view(R, -1, heads * width), dwhole_BKH.view_as(whole_RH), now_BNHP.permute(0, 2, 3, 1)
    )
