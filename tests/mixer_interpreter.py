"""Runs our own kernels of the Mamba-2 mixer on a CPU, in Triton's interpreter, against float64 autograd.

`python -m tests.mixer_interpreter` prints one JSON object: for each case, of each result and gradient, the largest
difference relative to the largest value. The interpreter is chosen at Triton's import, so this is a process of its own.
"""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor, nn

CASES: dict[str, tuple[int, int, int]] = {
    # width, images, tokens
    "two chunks": (64, 2, 70),
    "one chunk, odd rows": (32, 2, 30),
    "one token": (64, 1, 1),
    "two groups of heads": (288, 1, 17),
}
SCALES = (1, 4, 9, 16, 70)


def difference(found: Tensor, expected: Tensor) -> float:
    """NaN counts as infinite. Where nothing is expected but zeros: the largest of what was found."""
    largest = float(expected.detach().abs().max()) or 1.0
    worst = float((found.detach().double() - expected.detach()).abs().max()) / largest
    return worst if worst == worst else float("inf")


def pair(width: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Our kernels in `dtype`, and the definition in float64 with the same weights."""
    from mvar.model.mamba2 import DECAYS, Mamba2

    torch.manual_seed(0)
    ours = Mamba2(width, backend="triton")
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.uniform_(ours.A_log, 0.0, 2.5)
    nn.init.uniform_(ours.dt_bias, -4.0, -1.0)
    if dtype != torch.float32:
        ours.exact_3H = torch.stack([ours.get_parameter(name).detach().clone() for name in DECAYS])
        ours.to(dtype)
    exact = Mamba2(width, backend="torch").double()
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    if ours.exact_3H is not None:
        for name, value in zip(DECAYS, ours.exact_3H, strict=True):
            exact.get_parameter(name).data = value.double()
    return ours, exact


def compare(case: str, dtype: torch.dtype) -> dict[str, float]:
    width, images, tokens = CASES[case]
    ours, exact = pair(width, dtype)
    x_BLC, cotangent_BLC = (torch.randn(images, tokens, width).to(dtype) for _ in range(2))
    results = []
    for module, kind in ((ours, dtype), (exact, torch.float64)):
        x = x_BLC.to(kind, copy=True).requires_grad_()
        out = module(x)
        out.backward(cotangent_BLC.to(kind))
        results.append({"out": out, "dx": x.grad} | {f"d{name}": p.grad for name, p in module.named_parameters()})
    return {name: difference(results[0][name], results[1][name]) for name in results[1]}


@torch.no_grad()
def carried(dtype: torch.dtype) -> dict[str, float]:
    """Scale by scale with a state."""
    from mvar.model.mamba2 import MambaState

    ours, exact = pair(32, dtype)
    x_BLC, state, end = torch.randn(2, sum(SCALES), 32).to(dtype), MambaState(), MambaState()
    parts = [ours(part, state) for part in x_BLC.split(SCALES, dim=1)]
    wanted = exact(x_BLC.double(), end)
    assert state.ssm_BHPN is not None and state.tail_BVK is not None and end.ssm_BHPN is not None
    assert end.tail_BVK is not None
    return {
        "out": difference(torch.cat(parts, dim=1), wanted),
        "state": difference(state.ssm_BHPN, end.ssm_BHPN),
        "tail": difference(state.tail_BVK, end.tail_BVK),
    }


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    every = {f"{case} fp32": compare(case, torch.float32) for case in CASES}
    every["two chunks fp16"] = compare("two chunks", torch.float16)
    every |= {"carried fp32": carried(torch.float32), "carried fp16": carried(torch.float16)}
    print(json.dumps(every))
