"""Parts of `benchmarks.gpu` below a model: what the machine reaches by plain calls, and Mamba's mixer alone."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu_context import Context
from benchmarks.gpu_profile import profile_calls

CHUNKS = (64, 128, 256)


def machine(context: Context) -> None:
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        n = 64 if context.scale.tiny else 8192 if name != "fp32" else 4096
        a, b = (torch.randn(n, n, device=context.device, dtype=dtype) for _ in range(2))
        context.add(f"matmul_tflops_{name}", 2e-12 * n**3 / min(context.timed(partial(torch.matmul, a, b), 10)))
    source = torch.empty(2**10 if context.scale.tiny else 2**30, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    context.add("copy_tb_s", 2e-12 * source.numel() / min(context.timed(lambda: target.copy_(source), 10)))


def both_ways(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], None]:
    def run() -> None:
        out = function(*leaves)
        out.backward(torch.ones_like(out))
        for leaf in leaves:
            leaf.grad = None

    return run


def mixer(context: Context) -> None:
    from mvar.model.mamba2 import NORM_EPS, Mamba2

    images, tokens, width = (2, 30, 64) if context.scale.tiny else (64, 680, 1024)
    with context.device:
        module = Mamba2(width, backend=context.mixer("triton"))
    nn.init.uniform_(module.A_log, 0.0, 2.7)
    rows = module.in_proj.weight.shape[0]
    # What lies between the linear layers, with the parameters as a 16-bit engine keeps them.
    module.exact_3H = torch.stack([p.detach().clone() for p in (module.dt_bias, module.A_log, module.D)])
    module.to(torch.bfloat16)
    module.in_proj = module.out_proj = nn.Identity()  # type: ignore[assignment]
    zxbcdt_BLE = torch.randn(images, tokens, rows, device=context.device, dtype=torch.bfloat16).requires_grad_()
    ours_s = statistics.median(context.timed(both_ways(module, zxbcdt_BLE), 20, 5))
    context.add("mixer_ms", 1e3 * ours_s)
    if context.device.type != "cuda":
        return
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined as fused

    leaves = [zxbcdt_BLE, module.conv1d.weight.squeeze(1), module.conv1d.bias, module.norm.weight]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    decays = [module.exact_3H[0], -module.exact_3H[1].exp(), module.exact_3H[2]]
    decays = [decay.detach().requires_grad_() for decay in decays]
    theirs_s = []
    for chunk in CHUNKS:

        def call(*leaves: Tensor, chunk: int = chunk) -> Tensor:
            x, weight, bias, norm, dt_bias, a, d = leaves
            out: Tensor = fused(
                *(x, weight, bias, dt_bias, a),
                D=d,
                chunk_size=chunk,
                activation="silu",
                rmsnorm_weight=norm,
                headdim=64,
                rmsnorm_eps=NORM_EPS,
                ngroups=1,
                norm_before_gate=False,
            )
            return out

        theirs_s.append(statistics.median(context.timed(both_ways(call, *leaves, *decays), 20, 5)))
        context.add(f"mixer_mamba_ssm_chunk{chunk}_ms", 1e3 * theirs_s[-1])
    context.add("mixer_vs_mamba_ssm", min(theirs_s) / ours_s)
    profile_calls(context, "mixer", both_ways(module, zxbcdt_BLE))


WARM = """
import sys, torch
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan
chunk, start = int(sys.argv[1]), len(sys.argv) > 2
x, dt, b, c = (torch.randn(64, 680, *s, device="cuda", dtype=torch.bfloat16).requires_grad_()
               for s in ((32, 64), (32,), (1, 64), (1, 64)))
a = (-torch.rand(32, device="cuda") * 15 - 1).requires_grad_()
d, bias = torch.ones(32, device="cuda", requires_grad=True), torch.zeros(32, device="cuda", requires_grad=True)
state = torch.zeros(64, 32, 64, 64, device="cuda") if start else None
with torch.set_grad_enabled(not start):
    y, _ = scan(x, dt, a, b, c, chunk, D=d, dt_bias=bias, dt_softplus=True, initial_states=state,
                return_final_states=True)
if not start:
    y.backward(torch.ones_like(y))
torch.cuda.synchronize()
"""


def warm(context: Context) -> None:
    """One process for each chunk length, and one that starts from a state."""
    if context.device.type != "cuda":
        return
    words = [[str(chunk)] for chunk in CHUNKS] + [[str(chunk), "state"] for chunk in CHUNKS[1:]]
    started = [subprocess.Popen([sys.executable, "-c", WARM, *arguments]) for arguments in words]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError("mamba-ssm's kernels could not be compiled or run")
