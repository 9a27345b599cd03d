"""Runs the Triton kernels of group norm on a CPU, in Triton's interpreter, against float64.

`python -m tests.group_norm_interpreter` prints one JSON object: for each case the largest difference relative to the
largest value. The interpreter is chosen at Triton's import, so this is a process of its own.
"""

from __future__ import annotations

import json
import os

import torch
import torch.nn.functional as F

CASES = {
    # images, channels, side, groups, mean of what is normalised
    "several runs": (2, 40, 26, 8, 0.0),
    "one run": (1, 64, 8, 32, 0.0),
    "far from zero": (2, 40, 24, 8, 100.0),
    "one pixel": (1, 32, 1, 4, 0.0),
}


def compare(case: str, dtype: torch.dtype, silu: bool) -> float:
    from mvar.model.kernels.group_norm_triton import fused

    images, channels, side, groups, mean = CASES[case]
    torch.manual_seed(0)
    x_BCHW = (torch.randn(images, channels, side, side) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    weight_C, bias_C = torch.randn(channels), torch.randn(channels)
    found = fused(x_BCHW, weight_C, bias_C, groups, 1e-6, silu=silu)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    wanted = F.group_norm(x_BCHW.double(), groups, weight_C.double(), bias_C.double(), 1e-6)
    wanted = F.silu(wanted) if silu else wanted
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def alone_and_in_company() -> float:
    """Of one image: the largest difference between being normalised alone and among others."""
    from mvar.model.kernels.group_norm_triton import fused

    torch.manual_seed(1)
    x_BCHW = torch.randn(3, 16, 24, 24).contiguous(memory_format=torch.channels_last)
    weight_C, bias_C = torch.randn(16), torch.randn(16)
    together, alone = (fused(x, weight_C, bias_C, 4, 1e-6, silu=True) for x in (x_BCHW, x_BCHW[1:2]))
    return float((together[1:2] - alone).abs().max())


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    every = {f"{case} fp32": compare(case, torch.float32, silu=True) for case in CASES}
    every |= {"several runs fp16": compare("several runs", torch.float16, silu=True)}
    every |= {"several runs without SiLU": compare("several runs", torch.float32, silu=False)}
    every |= {"company": alone_and_in_company()}
    print(json.dumps(every))
