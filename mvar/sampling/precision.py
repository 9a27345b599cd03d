"""Which arithmetic samples are drawn in: a known quantity, by default the one that the weights were trained in."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mvar.config import Precision
from mvar.errors import BackendError
from mvar.log import Chosen
from mvar.model.kernels.arithmetic import Arithmetic
from mvar.model.kernels.precision import lacking

SamplePrecision = Literal["fp32", "tf32", "bf16", "fp16"]
PRECISIONS: tuple[SamplePrecision, ...] = get_args(SamplePrecision)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the big products run in."""
AMPERE = (8, 0)
"""First compute capability with bf16 and TF32."""
_TRAINED: dict[Precision, SamplePrecision] = {
    "bf16": "bf16",
    "bf16_autocast": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
}


def choose(asked: str, device: torch.device, trained: Precision | None) -> Chosen:
    """The arithmetic of that name. "auto": as the weights were trained, on a GPU; fp32 on a CPU.

    Raises BackendError where the device does not have what is asked for.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if asked != "auto":
        if asked == "tf32" and (capability is None or capability < AMPERE):
            raise BackendError("--precision tf32: needs an NVIDIA GPU from Ampere on. Use fp32, bf16 or fp16.")
        if problem := lacking(DTYPES[asked], device):
            return Chosen("precision", asked, f"it was asked for; {problem}, and fp32 is faster and exact", slow=True)
        return Chosen("precision", asked, "it was asked for")
    return _auto(capability, trained)


def _auto(capability: tuple[int, int] | None, trained: Precision | None) -> Chosen:
    if capability is None:
        return Chosen("precision", "fp32", "there is no GPU")
    way = _TRAINED[trained] if trained is not None else "bf16" if capability >= AMPERE else "fp16"
    reason = (
        f"the weights were trained in {trained}" if trained is not None else "nothing tells what they were trained in"
    )
    if way == "bf16" and capability < AMPERE:
        return Chosen("precision", "fp32", f"{reason}, which this GPU does not have")
    return Chosen("precision", way, reason)


def arithmetic(precision: SamplePrecision, device: torch.device) -> Arithmetic:
    """What the process is to be set to."""
    if precision == "tf32":
        return Arithmetic.of("fp32", "on", device)
    return Arithmetic.of(precision, "auto", device)
