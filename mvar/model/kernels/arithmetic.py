"""What fp32 means on this machine: the one place that allows or forbids TF32.

GPUs from Ampere on can multiply fp32 matrices with 10 bits of each factor (TF32), up to eight times faster. Where that
happens is a choice with a name, `engine.tf32`:

- A run in 16 bits (bf16, bf16_autocast, fp16) has few fp32 products: the head, the projection of the inputs, and dots
  inside mamba-ssm's scan. `auto` allows TF32 there, as the published training did.
- A run in fp32 is IEEE fp32 throughout, convolutions included, unless TF32 is asked for by name.
- The quantizer and the encoder are always IEEE fp32, whatever a process allows: their codes are a format.

The choice is made once for a process, because torch keeps it in global flags that the backward pass reads in threads
of its own; what must be exact is computed inside `ieee`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mvar.config import Precision, Switch
from mvar.errors import BackendError

_TRITON_DOTS = "TRITON_F32_DEFAULT"
"""How Triton multiplies fp32 where a kernel does not say: mamba-ssm's do not, and Triton's default is TF32."""


@dataclass(frozen=True)
class Arithmetic:
    """How a process multiplies: the compute dtype's name, and whether fp32 products may be TF32."""

    precision: Precision
    tf32: bool
    device: torch.device

    @classmethod
    def of(cls, precision: Precision, tf32: Switch, device: torch.device) -> Arithmetic:
        """Raises BackendError where TF32 is asked for and the device does not have it."""
        on_gpu = device.type == "cuda"
        if tf32 == "on" and not on_gpu:
            raise BackendError(f"engine.tf32=on: got device {device}, expected a GPU. Set engine.tf32=auto.")
        return cls(precision, on_gpu and (tf32 == "on" or (tf32 == "auto" and precision != "fp32")), device)

    def apply(self) -> None:
        """Set this process's flags. Without a GPU there is nothing to set. Call it before the first step."""
        if self.device.type != "cuda":
            return
        _set(self.tf32, self.tf32 and self.precision == "fp32")
        if not self.tf32:
            os.environ[_TRITON_DOTS] = "ieee"

    def __str__(self) -> str:
        if self.device.type != "cuda":
            return f"{self.precision}; fp32 products in IEEE fp32"
        exact = "convolutions and quantizer in IEEE fp32" if self.precision != "fp32" else "quantizer in IEEE fp32"
        wide = "everything" if self.precision == "fp32" else "head and input projection"
        return f"{self.precision}; {wide} in TF32, {exact}" if self.tf32 else f"{self.precision}; no TF32"


def tf32_allowed() -> bool:
    """Whether this process lets fp32 matrix products run in TF32."""
    return torch.get_float32_matmul_precision() != "highest"


@contextmanager
def products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """fp32 products and convolutions on `device` in TF32, or in IEEE fp32, while this lasts."""
    if device.type != "cuda":
        yield
        return
    before = tf32_allowed(), torch.backends.cudnn.allow_tf32
    _set(tf32, tf32)
    try:
        yield
    finally:
        _set(*before)


def ieee(device: torch.device) -> AbstractContextManager[None]:
    """IEEE fp32 on `device` while this lasts, whatever the process allows (cudnn allows TF32 by default)."""
    return products(device, tf32=False)


def running_sum(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`x.cumsum(dim)`, also under deterministic algorithms, where torch refuses it on GPUs whatever the shape.

    Only a tensor that is one single row is summed in an order that varies; several rows have kernels of their own.
    """
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()) or x.numel() == x.shape[dim]:
        return x.cumsum(dim, dtype=dtype)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return x.cumsum(dim, dtype=dtype)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


def _set(matmuls: bool, convolutions: bool) -> None:
    torch.set_float32_matmul_precision("high" if matmuls else "highest")
    torch.backends.cudnn.allow_tf32 = convolutions
