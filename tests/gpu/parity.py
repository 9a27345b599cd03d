"""How near a computation has to come to float64 on the CPU: the bands, and how nearness is measured.

Shapes: B images, L tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mvar.errors import BackendError
from mvar.model.attention import ScaleAttention
from mvar.model.kernels.precision import Linear
from mvar.model.mamba2 import DECAYS, Mamba2

LENGTHS_256 = tuple(side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
"""Tokens of the scales of a 256 px image, 680 in all."""


@dataclass(frozen=True)
class Band:
    """Largest relative errors: norm of the difference over norm of the value."""

    value: float
    """Of outputs, and of gradients of what is multiplied with every token."""
    few: float
    """Of gradients with one number a channel or a head: long sums whose terms cancel."""


BANDS = {
    torch.float32: Band(1e-5, 1e-4),
    torch.float16: Band(3e-3, 3e-2),
    torch.bfloat16: Band(2e-2, 2e-1),
}
TF32 = Band(3e-3, 3e-2)
"""float32 through mamba-ssm's kernels, which multiply in TF32 (10 bits of mantissa, as float16)."""


@dataclass(frozen=True)
class Mode:
    """An arithmetic that a module is run in."""

    dtype: torch.dtype
    stored: bool = False
    """The weights of matmuls are kept in `dtype`, as a 16-bit engine and sampling do; else autocast casts them."""

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") + ("_stored" if self.stored else "")

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        on = self.dtype != torch.float32 and not self.stored
        with torch.autocast(device.type, self.dtype if on else torch.bfloat16, enabled=on):
            yield


MODES = [
    Mode(torch.float32),
    Mode(torch.bfloat16),
    Mode(torch.float16),
    Mode(torch.bfloat16, stored=True),
    Mode(torch.float16, stored=True),
]


def place(module: nn.Module, weights: Mapping[str, Tensor], device: torch.device, mode: Mode) -> None:
    """Give a module float64 `weights` in the arithmetic of `mode`, on the device."""
    module.load_state_dict({name: value.float() for name, value in weights.items()})
    module.to(device)
    if not mode.stored:
        return
    for part in module.modules():
        if isinstance(part, Mamba2):
            decays = [part.get_parameter(name).detach().clone() for name in DECAYS]
            part.to(mode.dtype)
            part.exact_3H = torch.stack(decays)
        elif isinstance(part, ScaleAttention | Linear):
            part.to(mode.dtype)


def backend_or_skip(make: Callable[[], nn.Module]) -> nn.Module:
    """A module with the backend it asks for; skips, in the library's own words, where that is not installed."""
    try:
        return make()
    except BackendError as missing:
        pytest.skip(str(missing))


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error: norm of the difference over the norm of `wanted`."""
    wanted = wanted.detach().double().cpu()
    return float((found.detach().double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def assert_near(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], band: Band) -> None:
    """Every value within its band; the message lists all errors, largest first."""
    assert found.keys() == wanted.keys()
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    listed = sorted(((errors[name] / allowed(wanted[name], band), name) for name in wanted), reverse=True)
    text = "\n".join(f"{share:8.2f} of its band: {errors[name]:.2e} {name}" for share, name in listed)
    print(text.splitlines()[0])
    assert listed[0][0] <= 1, text


def allowed(value: Tensor, band: Band) -> float:
    return band.few if value.squeeze().dim() < 2 else band.value


def results(
    module: nn.Module, run: Callable[[Tensor], Tensor], x_BLC: Tensor, cotangent_BLC: Tensor
) -> dict[str, Tensor]:
    """Output, and gradients of the input and of every parameter."""
    x_BLC = x_BLC.clone().requires_grad_()
    module.zero_grad()
    output_BLC = run(x_BLC)
    output_BLC.backward(cotangent_BLC.to(output_BLC))
    assert x_BLC.grad is not None
    found = {"output": output_BLC.detach(), "grad of the input": x_BLC.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[f"grad of {name}"] = parameter.grad
    return found
