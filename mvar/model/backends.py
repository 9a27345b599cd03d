"""What `auto` comes to on a device: one line for each choice, with the reason where it is not the fast one."""

from __future__ import annotations

import torch

from mvar.config import ModelConfig, Switch
from mvar.log import Chosen
from mvar.model import attention, mamba_backend
from mvar.model.kernels import fused
from mvar.model.kernels.arithmetic import Arithmetic

DTYPES = {
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""engine.precision -> what the big matrix products run in."""


def chosen_backends(model: ModelConfig, arithmetic: Arithmetic, compiling: Switch) -> list[Chosen]:
    """How a training of `model` computes, as a start tells it. Raises BackendError as the model would."""
    dtype, device = DTYPES[arithmetic.precision], arithmetic.device
    width = model.resolved_width
    # On a CPU attention runs in fp32 whatever the precision.
    attended = dtype if device.type == "cuda" else torch.float32
    return [
        Chosen("arithmetic", str(arithmetic)),
        attention.choose(model.attention_backend, attended, device, width // model.resolved_heads),
        mamba_backend.choose(model.mamba_backend, dtype, device, arithmetic.tf32),
        fused.choose(compiling, device, model.depth, width),
    ]
