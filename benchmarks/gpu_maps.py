"""A part of `benchmarks.gpu`: what the tokenizer's network is made of, in every layout and type, by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_context import Context
from mvar.model.kernels.group_norm import group_norm

LEVELS = ((160, 256), (160, 128), (320, 64), (640, 16))
"""Channels and side of maps in the published geometry."""
ARITHMETIC = {"fp32": (torch.float32, False), "tf32": (torch.float32, True), "bf16": (torch.bfloat16, False)}
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


@torch.inference_mode()
def maps(context: Context) -> None:
    images = context.scale.images(32)
    for channels, side in ((32, 8),) if context.scale.tiny else LEVELS:
        for name, (dtype, tf32) in ARITHMETIC.items():
            for layout, order in LAYOUTS.items():
                x_BCHW = torch.randn(images, channels, side, side, device=context.device, dtype=dtype)
                x_BCHW = x_BCHW.contiguous(memory_format=order)
                key = f"{channels}x{side}_{name}_{layout}"
                convolution(context, key, x_BCHW, tf32)
                norm = nn.GroupNorm(32, channels, eps=1e-6, device=context.device, dtype=dtype)
                for which, call in (
                    ("torch", lambda norm=norm, x=x_BCHW: F.silu(norm(x), inplace=True)),
                    ("ours", lambda norm=norm, x=x_BCHW: group_norm(norm, x, silu=True)),
                ):
                    if which == "torch" or (layout == "last" and context.device.type == "cuda"):
                        context.add(f"norm_{key}_{which}_ms", 1e3 * min(context.timed(call, 5)))


def convolution(context: Context, key: str, x_BCHW: Tensor, tf32: bool) -> None:
    """TFLOP/s of a 3x3 convolution: by cuDNN's heuristics, as it measures itself, and as one matrix product."""
    images, channels, side, _ = x_BCHW.shape
    weight = torch.randn(channels, channels, 3, 3, device=x_BCHW.device, dtype=x_BCHW.dtype)
    weight = weight.contiguous(
        memory_format=torch.channels_last
        if x_BCHW.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    operations = 2 * 9 * channels * channels * side * side * images
    torch.backends.cuda.matmul.allow_tf32 = tf32
    for which, measured, call in ways(x_BCHW, weight):
        with torch.backends.cudnn.flags(enabled=True, benchmark=measured, deterministic=not measured, allow_tf32=tf32):
            seconds = min(context.timed(call, 5))
        context.add(f"conv_{key}_{which}_tflops", 1e-12 * operations / seconds)


def ways(x_BCHW: Tensor, weight: Tensor) -> Iterator[tuple[str, bool, Callable[[], Tensor]]]:
    """Name, whether cuDNN may try out what is fastest, and the convolution."""
    yield "heuristic", False, lambda: F.conv2d(x_BCHW, weight, padding=1)
    yield "tried", True, lambda: F.conv2d(x_BCHW, weight, padding=1)
    if x_BCHW.dtype == torch.float32 and x_BCHW.is_contiguous():
        flat = weight.flatten(1)
        yield "product", False, lambda: torch.cat([flat @ F.unfold(x, 3, padding=1) for x in x_BCHW.split(1)])
