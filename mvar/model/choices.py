"""What `auto` comes to on a device: one line for each choice, with the reason where it is not the fast one."""

from __future__ import annotations

import torch

from mvar.config import ModelConfig, Switch
from mvar.model import attention
from mvar.model.kernels import fused, mamba_ssm
from mvar.model.kernels.arithmetic import Arithmetic
from mvar.model.kernels.optional import Choice

DTYPES = {
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""engine.precision -> what the big matrix products run in."""


def choices(model: ModelConfig, arithmetic: Arithmetic, compiling: Switch) -> dict[str, Choice]:
    """By name: how a training of `model` computes, as a start prints it. Raises BackendError as the model would."""
    dtype, device = DTYPES[arithmetic.precision], arithmetic.device
    width = model.resolved_width
    # On a CPU attention runs in fp32 whatever the precision.
    attended = dtype if device.type == "cuda" else torch.float32
    return {
        "arithmetic": Choice(str(arithmetic)),
        "attention": attention.choose(model.attention_backend, attended, device, width // model.resolved_heads),
        "mamba": mamba_ssm.choose(model.mamba_backend, dtype, device, arithmetic.tf32),
        "compile": fused.choose(compiling, device, model.depth, width),
    }
