"""The state-space sum of Mamba-2 in Triton kernels ("Transformers are SSMs", §6).

Formulas are those of `mvar.model.kernels.ssd`. A first kernel turns step sizes into exponents. A sequence has some
hundred tokens and a batch thousands of heads, so forward a program owns one head of one image and goes over its chunks
with the state in registers: no chunk waits for another program, and no state is written. Backward, one kernel goes over
the chunks both ways and keeps the states between them; in the next a program owns a chunk and several heads, which
share B and C and add up their gradients in registers. No atomics: the same bits every time.

x, B and C lie side by side in rows of K = HP + 2N; step sizes are a slice of wider rows, before bias and softplus.
Shapes: B images, L tokens, H heads, P head width, N state, R chunks of Q tokens, T = RQ, G groups of heads.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton reads annotations of kernels as names of its own types.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvar.model.kernels.launch import block, on

GROUP = 8
"""Heads that one program of the backward pass goes over."""
CHUNK_MIN = 16
"""Tokens of the shortest chunk: Triton's products want so many a side."""
LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Decays:
    """What the recurrence has once a head, float32 (H): the step's bias, log(-A), and what x itself is worth."""

    dt_bias_H: Tensor
    A_log_H: Tensor
    D_H: Tensor

    @classmethod
    def of(cls, parameters: Sequence[Tensor], exact_3H: Tensor | None) -> Decays:
        """Of parameters, or of float32 values that are kept beside 16-bit ones."""
        return cls(*(value.float() for value in (parameters if exact_3H is None else exact_3H)))


@dataclass(frozen=True)
class Shape:
    """How a sequence is cut and computed."""

    heads: int
    width: int
    state: int
    chunk: int
    """Tokens of a chunk, a power of two: 64 in 16 bits, where all products are equally large then; float32 takes twice
    the registers."""
    narrow: bool
    precision: str

    @classmethod
    def of(cls, xBC_BLK: Tensor, dt_BLH: Tensor, width: int, precision: str) -> Shape:
        length, heads = dt_BLH.shape[1:]
        narrow = xBC_BLK.dtype != torch.float32
        chunk = max(CHUNK_MIN, min(64 if narrow else 32, block(length)))
        return cls(heads, width, (xBC_BLK.shape[-1] - heads * width) // 2, chunk, narrow, precision)

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "HEADS": self.heads,
            "WIDTH": self.width,
            "STATE": self.state,
            "CHUNK": self.chunk,
            "PRECISION": self.precision,
        }

    @property
    def options(self) -> dict[str, int]:
        """Of programs that go over the chunks of one head."""
        return {"num_warps": 4 if self.narrow else 8, "num_stages": 2 if self.narrow else 1}

    @property
    def group_options(self) -> dict[str, int]:
        """Of programs that go over the heads of one chunk."""
        return {"GROUP": GROUP, "num_warps": 8, "num_stages": 2 if self.narrow else 1}


def forward(
    xBC_BLK: Tensor,
    dt_BLH: Tensor,
    decays: Decays,
    head_width: int,
    precision: str,
    state_BHPN: Tensor | None = None,
    *,
    final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y (B, L, H*P) in x's dtype and, if `final`, the float32 state after the last token.

    `xBC_BLK`: contiguous. `precision`: of float32 products, "ieee" or "tf32".
    """
    batch, length, heads = dt_BLH.shape
    shape = Shape.of(xBC_BLK, dt_BLH, head_width, precision)
    y_BLI = xBC_BLK.new_empty(batch, length, heads * head_width)
    final_BHPN = None
    if final:
        final_BHPN = xBC_BLK.new_empty(batch, heads, head_width, shape.state, dtype=torch.float32)
    if batch:
        with on(xBC_BLK):
            ssd_forward_kernel[(batch * heads,)](
                xBC_BLK, *_steps(dt_BLH, decays, shape.chunk), decays.D_H, state_BHPN, y_BLI, final_BHPN, length,
                **shape.constants, **shape.options,
            )  # fmt: skip
    return y_BLI, final_BHPN


def backward(
    dy_BLI: Tensor,
    xBC_BLK: Tensor,
    dt_BLH: Tensor,
    decays: Decays,
    head_width: int,
    precision: str,
    ddt_BLH: Tensor,
) -> tuple[Tensor, Decays]:
    """Gradients of [x, B, C] in their dtype, and of the decays; the step sizes' is written into `ddt_BLH`, a slice.

    For a sequence without a state before it, whose last state nobody used.
    """
    batch, length, heads = dt_BLH.shape
    shape = Shape.of(xBC_BLK, dt_BLH, head_width, precision)
    chunks, groups = triton.cdiv(length, shape.chunk), triton.cdiv(heads, GROUP)
    # bf16 holds what float32 holds, with fewer digits; fp16 might overflow.
    kept = torch.bfloat16 if xBC_BLK.dtype == torch.bfloat16 else torch.float32
    states_2BHRNP = xBC_BLK.new_empty(2, batch, heads, chunks, shape.state, head_width, dtype=kept)
    dxBC_BLK = torch.empty_like(xBC_BLK)
    scores_BRQQ = states_2BHRNP.new_empty(batch, chunks, shape.chunk, shape.chunk, dtype=torch.float32)
    dBC_GBLN = xBC_BLK.new_empty(groups, batch, length, 2 * shape.state, dtype=torch.float32)
    ddecays_3BRH = xBC_BLK.new_empty(3, batch * chunks, heads, dtype=torch.float32)
    if batch:
        with on(xBC_BLK):
            steps_2BHT = _steps(dt_BLH, decays, shape.chunk)
            dsteps_3BHT = steps_2BHT.new_empty(3, *steps_2BHT.shape[1:])
            before, dafter = states_2BHRNP.unbind()
            ssd_states_kernel[(batch * heads,)](
                xBC_BLK, *steps_2BHT, dy_BLI, before, dafter, length, **shape.constants, **shape.options
            )
            ssd_scores_kernel[(batch * chunks,)](xBC_BLK, scores_BRQQ, length, chunks, **shape.constants, num_warps=4)
            ssd_within_kernel[(batch * chunks, groups)](
                xBC_BLK, *steps_2BHT, scores_BRQQ, decays.D_H, dy_BLI, dafter,
                dxBC_BLK, dBC_GBLN, *dsteps_3BHT, batch, length, chunks, **shape.constants, **shape.group_options,
            )  # fmt: skip
            ssd_between_kernel[(batch * chunks, groups)](
                xBC_BLK, *steps_2BHT, dt_BLH, decays.dt_bias_H, decays.A_log_H, dy_BLI, before, dafter,
                dBC_GBLN, *dsteps_3BHT, ddt_BLH, *ddecays_3BRH, batch, length, chunks,
                dt_BLH.stride(0), dt_BLH.stride(1), ddt_BLH.stride(0), ddt_BLH.stride(1),
                **shape.constants, **shape.group_options,
            )  # fmt: skip
    dxBC_BLK[..., heads * head_width :] = dBC_GBLN.sum(0) if groups > 1 else dBC_GBLN[0]
    return dxBC_BLK, Decays(*ddecays_3BRH.sum(1))


def _steps(dt_BLH: Tensor, decays: Decays, chunk: int) -> Tensor:
    """Step sizes softplus(raw + bias), and the running sums of dt A inside their chunks as exponents of 2.

    Whole chunks: step sizes are zero beyond the last token, where nothing moves.
    """
    batch, length, heads = dt_BLH.shape
    chunks = triton.cdiv(length, chunk)
    steps_2BHT = decays.D_H.new_empty(2, batch, heads, chunks * chunk)
    ssd_steps_kernel[(batch * chunks,)](
        dt_BLH, decays.dt_bias_H, decays.A_log_H, *steps_2BHT, length, chunks,
        dt_BLH.stride(0), dt_BLH.stride(1),
        HEADS=heads, LANES=block(heads), CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return steps_2BHT


@triton.jit(do_not_specialize=("length", "chunks", "dt_image", "dt_row"))
def ssd_steps_kernel(
    raw_ptr,
    dt_bias_ptr,
    a_log_ptr,
    dt_ptr,
    s_ptr,
    length,
    chunks,
    dt_image,
    dt_row,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    token = (tl.program_id(0) % chunks) * CHUNK + tl.arange(0, CHUNK)
    head = tl.arange(0, LANES)
    inside = head < HEADS
    here = (token < length)[:, None] & inside[None, :]
    raw = tl.load(raw_ptr + image * dt_image + token[:, None] * dt_row + head[None, :], mask=here, other=0.0)
    raw = raw.to(tl.float32) + tl.load(dt_bias_ptr + head, mask=inside, other=0.0)[None, :]
    dt = tl.where(here, tl.maximum(raw, 0.0) + _log1p(tl.exp(-tl.abs(raw))), 0.0)
    a = -tl.exp(tl.load(a_log_ptr + head, mask=inside, other=0.0)) * LOG2E
    at = (image * HEADS + head[None, :]) * (chunks * CHUNK) + token[:, None]
    tl.store(dt_ptr + at, dt, mask=inside[None, :])
    tl.store(s_ptr + at, tl.cumsum(dt * a[None, :], 0), mask=inside[None, :])


@triton.jit(do_not_specialize=("length",))
def ssd_forward_kernel(
    xbc_ptr,
    dt_ptr,
    s_ptr,
    d_ptr,
    state_ptr,
    y_ptr,
    final_ptr,
    length,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    ROW: tl.constexpr = HEADS * WIDTH + 2 * STATE
    chunks = tl.cdiv(length, CHUNK)
    xbc_ptr += image * length * ROW
    y_ptr += image * length * (HEADS * WIDTH) + head * WIDTH
    to_steps = tl.program_id(0).to(tl.int64) * chunks * CHUNK
    d = tl.load(d_ptr + head)
    q, n, p = tl.arange(0, CHUNK), tl.arange(0, STATE), tl.arange(0, WIDTH)
    at_state = tl.program_id(0).to(tl.int64) * (WIDTH * STATE) + n[:, None] + p[None, :] * STATE
    state = tl.zeros((STATE, WIDTH), tl.float32)
    if state_ptr is not None:
        state = tl.load(state_ptr + at_state)
    for chunk in tl.range(0, chunks):
        token = chunk * CHUNK + q
        here = token < length
        x = _tile(xbc_ptr + head * WIDTH, token, here, ROW, WIDTH)
        b = _tile(xbc_ptr + HEADS * WIDTH, token, here, ROW, STATE)
        c = _tile(xbc_ptr + HEADS * WIDTH + STATE, token, here, ROW, STATE)
        dt, s, total = _chunk_steps(dt_ptr + to_steps, s_ptr + to_steps, chunk, CHUNK)
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION) * _decay(s, q) * dt[None, :]
        y = tl.dot(c, state.to(c.dtype), input_precision=PRECISION) * tl.exp2(s)[:, None]
        y += tl.dot(scores.to(x.dtype), x, input_precision=PRECISION)
        y += d * x.to(tl.float32)
        _store(y_ptr, y, token, here, HEADS * WIDTH, WIDTH)
        state = _advanced(state, total, b, tl.exp2(total - s) * dt, x, PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + at_state, state)


@triton.jit(do_not_specialize=("length",))
def ssd_states_kernel(
    xbc_ptr,
    dt_ptr,
    s_ptr,
    dy_ptr,
    before_ptr,
    dafter_ptr,
    length,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before each chunk, and the gradient of the state after it."""
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    ROW: tl.constexpr = HEADS * WIDTH + 2 * STATE
    chunks = tl.cdiv(length, CHUNK)
    xbc_ptr += image * length * ROW
    dy_ptr += image * length * (HEADS * WIDTH) + head * WIDTH
    to_steps = tl.program_id(0).to(tl.int64) * chunks * CHUNK
    q, n, p = tl.arange(0, CHUNK), tl.arange(0, STATE), tl.arange(0, WIDTH)
    at_states = tl.program_id(0).to(tl.int64) * chunks * (STATE * WIDTH) + n[:, None] * WIDTH + p[None, :]
    state = tl.zeros((STATE, WIDTH), tl.float32)
    for chunk in tl.range(0, chunks):
        token = chunk * CHUNK + q
        here = token < length
        tl.store(before_ptr + at_states + chunk * (STATE * WIDTH), state.to(before_ptr.dtype.element_ty))
        x = _tile(xbc_ptr + head * WIDTH, token, here, ROW, WIDTH)
        b = _tile(xbc_ptr + HEADS * WIDTH, token, here, ROW, STATE)
        dt, s, total = _chunk_steps(dt_ptr + to_steps, s_ptr + to_steps, chunk, CHUNK)
        state = _advanced(state, total, b, tl.exp2(total - s) * dt, x, PRECISION)
    dstate = tl.zeros((STATE, WIDTH), tl.float32)
    for back in tl.range(0, chunks):
        chunk = chunks - 1 - back
        token = chunk * CHUNK + q
        here = token < length
        tl.store(dafter_ptr + at_states + chunk * (STATE * WIDTH), dstate.to(dafter_ptr.dtype.element_ty))
        dy = _tile(dy_ptr, token, here, HEADS * WIDTH, WIDTH)
        c = _tile(xbc_ptr + HEADS * WIDTH + STATE, token, here, ROW, STATE)
        _, s, total = _chunk_steps(dt_ptr + to_steps, s_ptr + to_steps, chunk, CHUNK)
        dstate = _advanced(dstate, total, c, tl.exp2(s), dy, PRECISION)


@triton.jit(do_not_specialize=("length", "chunks"))
def ssd_scores_kernel(
    xbc_ptr,
    scores_ptr,
    length,
    chunks,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C B^T of each chunk, for all heads."""
    ROW: tl.constexpr = HEADS * WIDTH + 2 * STATE
    q = tl.arange(0, CHUNK)
    token = (tl.program_id(0) % chunks) * CHUNK + q
    xbc_ptr += (tl.program_id(0) // chunks).to(tl.int64) * length * ROW
    b = _tile(xbc_ptr + HEADS * WIDTH, token, token < length, ROW, STATE)
    c = _tile(xbc_ptr + HEADS * WIDTH + STATE, token, token < length, ROW, STATE)
    at = tl.program_id(0).to(tl.int64) * (CHUNK * CHUNK) + q[:, None] * CHUNK + q[None, :]
    tl.store(scores_ptr + at, tl.dot(c, tl.trans(b), input_precision=PRECISION))


@triton.jit(do_not_specialize=("batch", "length", "chunks"))
def ssd_within_kernel(
    xbc_ptr,
    dt_ptr,
    s_ptr,
    scores_ptr,
    d_ptr,
    dy_ptr,
    dafter_ptr,
    dxbc_ptr,
    dbc_ptr,
    ddt_ptr,
    ds_ptr,
    dwhole_ptr,
    batch,
    length,
    chunks,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What the tokens of a chunk owe each other, and x: dx, and parts of the gradients of B, C, dt and s."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    group = tl.program_id(1)
    ROW: tl.constexpr = HEADS * WIDTH + 2 * STATE
    q, n, p = tl.arange(0, CHUNK), tl.arange(0, STATE), tl.arange(0, WIDTH)
    token = chunk * CHUNK + q
    here = token < length
    xbc_ptr += image * length * ROW
    dxbc_ptr += image * length * ROW
    dy_ptr += image * length * (HEADS * WIDTH)
    b = _tile(xbc_ptr + HEADS * WIDTH, token, here, ROW, STATE)
    c = _tile(xbc_ptr + HEADS * WIDTH + STATE, token, here, ROW, STATE)
    scores = tl.load(scores_ptr + tl.program_id(0).to(tl.int64) * (CHUNK * CHUNK) + q[:, None] * CHUNK + q[None, :])
    dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for head in tl.range(group * GROUP, tl.minimum((group + 1) * GROUP, HEADS)):
        to_steps = (image * HEADS + head) * chunks * CHUNK
        dt, s, total = _chunk_steps(dt_ptr + to_steps, s_ptr + to_steps, chunk, CHUNK)
        x = _tile(xbc_ptr + head * WIDTH, token, here, ROW, WIDTH)
        dy = _tile(dy_ptr + head * WIDTH, token, here, HEADS * WIDTH, WIDTH)
        at = ((image * HEADS + head) * chunks + chunk) * (STATE * WIDTH) + n[:, None] * WIDTH + p[None, :]
        dafter = tl.load(dafter_ptr + at).to(b.dtype)
        raw = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
        raw *= _decay(s, q)
        dscores += raw * dt[None, :]
        pairs = raw * scores
        ddt = tl.sum(pairs, 0)
        ds = tl.sum(pairs * dt[None, :], 1)
        weights = scores * _decay(s, q) * dt[None, :]
        dx = tl.dot(tl.trans(weights.to(dy.dtype)), dy, input_precision=PRECISION)

        u = tl.dot(b, dafter, input_precision=PRECISION) * tl.exp2(total - s)[:, None]
        # Subtracted: an added tile would begin the product's sum, and Triton would lay out both products in one way.
        dx = dx - u * -dt[:, None] + tl.load(d_ptr + head) * dy.to(tl.float32)
        _store(dxbc_ptr + head * WIDTH, dx, token, here, ROW, WIDTH)
        to_state = tl.sum(x.to(tl.float32) * u, 1)
        ddt += to_state
        tl.store(ddt_ptr + to_steps + token, ddt)
        tl.store(ds_ptr + to_steps + token, ds - ddt * dt)
        tl.store(dwhole_ptr + to_steps + token, to_state * dt)
    low = dscores.to(b.dtype)
    dbc_ptr += (group * batch + image) * length * (2 * STATE)
    _store(dbc_ptr, tl.dot(tl.trans(low), c, input_precision=PRECISION), token, here, 2 * STATE, STATE)
    _store(dbc_ptr + STATE, tl.dot(low, b, input_precision=PRECISION), token, here, 2 * STATE, STATE)


@triton.jit(do_not_specialize=("batch", "length", "chunks", "dt_image", "dt_row", "draw_image", "draw_row"))
def ssd_between_kernel(
    xbc_ptr,
    dt_ptr,
    s_ptr,
    raw_ptr,
    dt_bias_ptr,
    a_log_ptr,
    dy_ptr,
    before_ptr,
    dafter_ptr,
    dbc_ptr,
    ddt_ptr,
    ds_ptr,
    dwhole_ptr,
    draw_ptr,
    dbias_ptr,
    da_log_ptr,
    dd_ptr,
    batch,
    length,
    chunks,
    dt_image,
    dt_row,
    draw_image,
    draw_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What the tokens of a chunk owe the states at its ends, on top of what `ssd_within_kernel` found."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    group = tl.program_id(1)
    ROW: tl.constexpr = HEADS * WIDTH + 2 * STATE
    q, n, p = tl.arange(0, CHUNK), tl.arange(0, STATE), tl.arange(0, WIDTH)
    token = chunk * CHUNK + q
    here = token < length
    xbc_ptr += image * length * ROW
    dy_ptr += image * length * (HEADS * WIDTH)
    raw_ptr += image * dt_image + token * dt_row
    draw_ptr += image * draw_image + token * draw_row
    dbias_ptr += tl.program_id(0).to(tl.int64) * HEADS
    da_log_ptr += tl.program_id(0).to(tl.int64) * HEADS
    dd_ptr += tl.program_id(0).to(tl.int64) * HEADS
    dbc_ptr += (group * batch + image) * length * (2 * STATE)
    db = _tile(dbc_ptr, token, here, 2 * STATE, STATE)
    dc = _tile(dbc_ptr + STATE, token, here, 2 * STATE, STATE)
    c = _tile(xbc_ptr + HEADS * WIDTH + STATE, token, here, ROW, STATE)
    for head in tl.range(group * GROUP, tl.minimum((group + 1) * GROUP, HEADS)):
        to_steps = (image * HEADS + head) * chunks * CHUNK
        dt, s, total = _chunk_steps(dt_ptr + to_steps, s_ptr + to_steps, chunk, CHUNK)
        x = _tile(xbc_ptr + head * WIDTH, token, here, ROW, WIDTH)
        dy = _tile(dy_ptr + head * WIDTH, token, here, HEADS * WIDTH, WIDTH)
        at = ((image * HEADS + head) * chunks + chunk) * (STATE * WIDTH) + n[:, None] * WIDTH + p[None, :]
        before, dafter = tl.load(before_ptr + at), tl.load(dafter_ptr + at)
        from_state = tl.dot(dy, tl.trans(before.to(dy.dtype)), input_precision=PRECISION) * tl.exp2(s)[:, None]
        dc += from_state
        ds = tl.load(ds_ptr + to_steps + token) + tl.sum(from_state * c.to(tl.float32), 1)
        wide_x = x.to(tl.float32)
        weighted = (wide_x * (tl.exp2(total - s) * dt)[:, None]).to(x.dtype)
        db += tl.dot(weighted, tl.trans(dafter.to(x.dtype)), input_precision=PRECISION)
        dwhole = tl.exp2(total) * tl.sum(before.to(tl.float32) * dafter.to(tl.float32))
        dwhole += tl.sum(tl.load(dwhole_ptr + to_steps + token), 0)
        dstep = tl.cumsum(ds, 0, reverse=True) + dwhole
        a = -tl.exp(tl.load(a_log_ptr + head))
        raw = tl.load(raw_ptr + head, mask=here, other=0.0).to(tl.float32) + tl.load(dt_bias_ptr + head)
        draw = tl.where(here, (tl.load(ddt_ptr + to_steps + token) + a * dstep) * tl.sigmoid(raw), 0.0)
        tl.store(draw_ptr + head, draw.to(draw_ptr.dtype.element_ty), mask=here)
        tl.store(dbias_ptr + head, tl.sum(draw, 0))
        tl.store(da_log_ptr + head, a * tl.sum(dt * dstep, 0))
        tl.store(dd_ptr + head, tl.sum(wide_x * dy.to(tl.float32)))
    _store(dbc_ptr, db, token, here, 2 * STATE, STATE)
    _store(dbc_ptr + STATE, dc, token, here, 2 * STATE, STATE)


@triton.jit
def _log1p(x):
    """For x in [0, 1]. What the addition of 1 rounds off is a factor of the result (Kahan)."""
    more = 1.0 + x
    return tl.where(more == 1.0, x, tl.log(more) * (x / tl.where(more == 1.0, 1.0, more - 1.0)))


@triton.jit
def _tile(ptr, token, here, stride, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    return tl.load(ptr + token[:, None] * stride + lane[None, :], mask=here[:, None], other=0.0)


@triton.jit
def _store(ptr, x, token, here, stride, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH)
    tl.store(ptr + token[:, None] * stride + lane[None, :], x.to(ptr.dtype.element_ty), mask=here[:, None])


@triton.jit
def _chunk_steps(dt_ptr, s_ptr, chunk, CHUNK: tl.constexpr):
    """Step sizes of a chunk, the running sum of dt A, and the whole of it."""
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    return tl.load(dt_ptr + at), tl.load(s_ptr + at), tl.load(s_ptr + chunk * CHUNK + CHUNK - 1)


@triton.jit
def _advanced(state, total, rows, weights, values, PRECISION: tl.constexpr):
    """A state (N, P) past a chunk: what is left of it, and each token's weighted row times its value."""
    weighted = (rows.to(tl.float32) * weights[:, None]).to(values.dtype)
    return state * tl.exp2(total) + tl.dot(tl.trans(weighted), values, input_precision=PRECISION)


@triton.jit
def _decay(s, q):
    """How much of token j's share in the state is left at token i: lower-triangular."""
    return tl.exp2(tl.where(q[:, None] >= q[None, :], s[:, None] - s[None, :], -float("inf")))
