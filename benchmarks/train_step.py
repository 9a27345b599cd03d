"""A whole training step against the same model written in plain torch, and the memory that it keeps against the plan.

The baseline has the same weights, linear layers, dtypes and batch. Where ours has code of its own it has what a direct
port of the paper has: one attention over all tokens with a block-diagonal mask, Mamba-2's chunked sum as einsums under
autograd ("Transformers are SSMs", Dao and Gu 2024, section 6), conv1d and the gated norm written out, all logits at
once, torch's default AdamW. Ours is a step of the engine as `mvar train` takes it, on one process with ZeRO 2. In fp32
both begin with the same loss, which is checked.

tokens_vs_baseline_fp32   tokens a second of ours divided by the baseline's
tokens_vs_baseline_bf16   the same, ours with engine.precision=bf16, the baseline under bf16 autocast
peak_share_fp32           operations of a step (as for MFU) a second, divided by what torch.matmul reaches in fp32
peak_share_bf16           the same in bf16; above 1 on a CPU without 16-bit instructions, where products run in fp32
memory_vs_plan            bytes kept for the backward pass (GPU: peak of the step) divided by the plan's, in fp32
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.checkpoint import Run, made_up_batch
from benchmarks.harness import Report, parser, side_by_side, spread
from benchmarks.roofline import matmul_gflops
from mvar.config import TrainConfig
from mvar.model.attention import ScaleAttention
from mvar.model.init import init_weights_
from mvar.model.kernels.precision import product_dtype, wide
from mvar.model.mamba2 import NORM_EPS, STATE, Mamba2, MambaState
from mvar.model.token_loss import TokenLosses
from mvar.model.transformer import MVAR
from mvar.plan.flops import flops
from mvar.plan.memory import Kernels, Setup, memory, saved_for_backward
from mvar.plan.sizes import Sizes
from mvar.run import world as worlds
from mvar.run.world import World
from mvar.testing.engine_bytes import kept_by_autograd
from mvar.training.engine import parameter_groups
from mvar.training.objective import Objective

PLAIN_CHUNK = 64
"""Tokens of a chunk in the paper's listing."""


def dense_attention(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths: tuple[int, ...], *, softmax_scale: float
) -> Tensor:
    """All tokens at once; the mask lets a token see those of its own scale."""
    scale_L = torch.repeat_interleave(torch.tensor(lengths, device=q_BLHD.device))
    mask_LL = scale_L.unsqueeze(0) == scale_L.unsqueeze(1)
    q, k, v = (t.transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=softmax_scale).transpose(1, 2)


def plain_ssd(x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_H: Tensor) -> Tensor:
    """Mamba-2's sum in chunks, everything left to autograd: b images, k chunks, i and j tokens of one, h, p, n."""
    length = x_BLHP.shape[1]
    pad = -length % PLAIN_CHUNK
    x, dt, B, C = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)).unflatten(1, (-1, PLAIN_CHUNK))
        for t in (x_BLHP, dt_BLH, B_BLN, C_BLN)
    )
    s = (dt * A_H).cumsum(2)
    sent = x * dt.unsqueeze(-1).to(x.dtype)
    differences = s.unsqueeze(3) - s.unsqueeze(2)
    below = torch.ones(PLAIN_CHUNK, PLAIN_CHUNK, dtype=torch.bool, device=x.device).tril()[..., None]
    decay = differences.masked_fill(~below, -torch.inf).exp().to(x.dtype)
    scores = torch.einsum("bkin,bkjn->bkij", C, B)
    inside = torch.einsum("bkij,bkijh,bkjhp->bkihp", scores, decay, sent)
    gains = torch.einsum("bkjn,bkjh,bkjhp->bkhpn", B, (s[:, :, -1:] - s).exp().to(x.dtype), sent)
    state = torch.zeros_like(gains[:, 0])
    before = []
    for k in range(gains.shape[1]):
        before.append(state)
        state = state * s[:, k, -1].exp()[..., None, None].to(x.dtype) + gains[:, k]
    seen = torch.einsum("bkin,bkhpn,bkih->bkihp", C, torch.stack(before, 1), s.exp().to(x.dtype))
    y_BLHP = (inside + seen).flatten(1, 2)[:, :length]
    return y_BLHP + x_BLHP * D_H.to(x.dtype).unsqueeze(-1)


def plain_mix(mamba: Mamba2, zxbcdt_BLE: Tensor, state: MambaState | None) -> Tensor:
    """What lies between Mamba-2's two linear layers."""
    assert state is None
    dtype, length = zxbcdt_BLE.dtype, zxbcdt_BLE.shape[1]
    z, xBC_BLK, dt_BLH = torch.split(zxbcdt_BLE, [mamba.inner, mamba.inner + 2 * STATE, mamba.heads], dim=-1)
    weight, bias = mamba.conv1d.weight.to(dtype), mamba.conv1d.bias.to(dtype)
    conv_BKL = F.conv1d(xBC_BLK.transpose(1, 2), weight, bias, padding=weight.shape[-1] - 1, groups=len(weight))
    conv_BLK = F.silu(conv_BKL[..., :length].transpose(1, 2)).to(product_dtype(dtype, zxbcdt_BLE.device))
    x, B_BLN, C_BLN = torch.split(conv_BLK, [mamba.inner, STATE, STATE], dim=-1)
    dt_BLH = F.softplus(dt_BLH.to(wide(dtype)) + mamba.dt_bias)
    y_BLHP = plain_ssd(x.unflatten(-1, (mamba.heads, -1)), dt_BLH, -mamba.A_log.exp(), B_BLN, C_BLN, mamba.D)
    gated = y_BLHP.flatten(2).float() * F.silu(z.float())
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + NORM_EPS)
    return (normed * mamba.norm.weight).to(dtype)


class PlainRun:
    """The baseline: a training loop without an engine."""

    def __init__(self, config: TrainConfig, objective: Objective) -> None:
        model = config.model
        assert model.num_classes is not None
        self.config, self.done, self.objective, self.device = config, 0, objective, objective.device
        self.model = MVAR.from_config(model, num_classes=model.num_classes)
        init_weights_(self.model, config.seed)
        self.model.to(self.device)
        for module in self.model.modules():
            if isinstance(module, ScaleAttention):
                module._attend = partial(dense_attention, softmax_scale=module.softmax_scale)  # type: ignore[method-assign]
            if isinstance(module, Mamba2):
                module.backend = "torch"
                module._mix_torch = partial(plain_mix, module)  # type: ignore[method-assign]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=config.optim.base_lr)
        self.dtype = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16

    def _losses(self, labels_B: Tensor, x_BLC: Tensor, *, codes_BL: Tensor, **options: Any) -> TokenLosses:
        logits_BLV = self.model(labels_B, x_BLC)
        loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), codes_BL, reduction="none")
        return TokenLosses(loss_BL, loss_BL.detach(), logits_BLV.argmax(-1) == codes_BL)

    def step(self) -> float:
        batch = made_up_batch(self.config, self.done)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.objective(self._losses, batch.codes_BL, batch.labels_B).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.item()


def configuration(folder: Path, depth: int, batch: int, precision: str) -> TrainConfig:
    """Without random dropping, so that both see the same numbers."""
    return TrainConfig.model_validate(
        {
            "run": str(folder),
            "global_batch": batch,
            "data": {"store": "none"},
            "model": {"depth": depth, "num_classes": 1000, "drop_path": 0.0, "label_drop": 0.0},
            "engine": {"precision": precision, "ds_config": "ds_configs/zero2.json"},
        }
    )


def measure(report: Report, config: TrainConfig, world: World, rounds: int) -> None:
    """Add the figures of one precision."""
    precision = config.engine.precision
    ours = Run(config, world)
    plain = PlainRun(config, ours.engine.objective)
    report.context["parameters"] = ours.engine.parameters
    if precision == "fp32":
        difference = abs(plain.step() - ours.loss().item())
        report.context["loss_difference_fp32"] = difference
        if difference > 1e-4:
            raise SystemExit(f"ours and the baseline are different models: their first losses differ by {difference:g}")
        report.add("memory_vs_plan", memory_against_plan(ours, world))
    seconds = side_by_side({"ours": ours.step, "plain": plain.step}, rounds)
    step_s = statistics.median(seconds["ours"])
    sizes = Sizes.of(config.model)
    ratio = statistics.median(seconds["plain"]) / step_s
    report.add(f"tokens_vs_baseline_{precision}", ratio, how={name: spread(taken) for name, taken in seconds.items()})
    report.add(f"tokens_per_s_{precision}", config.global_batch * sizes.tokens / step_s)
    peak = matmul_gflops(torch.float32 if precision == "fp32" else torch.bfloat16, world.device)
    report.add(f"peak_share_{precision}", config.global_batch * flops(sizes).training / step_s / 1e9 / peak)


def memory_against_plan(run: Run, world: World) -> float:
    """What a step keeps, divided by the plan's figure. On a GPU the peak, else what autograd keeps."""
    config = run.config
    kernels: Kernels = "cpu"
    if world.device.type == "cuda":
        kernels = "gpu" if all(find_spec(name) for name in ("flash_attn", "mamba_ssm")) else "gpu_torch"
    setup = Setup(2, config.engine.precision, 1, kernels=kernels)
    sizes = Sizes.of(config.model)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run.step()
        return torch.cuda.max_memory_allocated() / memory(sizes, setup, config.global_batch).peak
    with kept_by_autograd(run.engine.model.parameters()) as kept:
        run.loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / saved_for_backward(
        sizes, setup, config.global_batch
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--depth", type=int, default=12, help="depth of the model (default 12)")
    options.add_argument("--batch", type=int, default=2, help="images of a step (default 2)")
    options.add_argument("--rounds", type=int, default=3, help="rounds after the warm-up (default 3)")
    options.add_argument("--precision", choices=["fp32", "bf16", "both"], default="both", help="default both")
    args = options.parse_args(argv)
    report = Report("train_step")
    report.context |= {"depth": args.depth, "batch": args.batch}
    world = worlds.start()
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16") if args.precision == "both" else (args.precision,):
            measure(report, configuration(Path(folder), args.depth, args.batch, precision), world, args.rounds)
            gc.collect()
    worlds.finish()
    report.finish(args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
