"""A machine with a GPU that is not there: tensors on "cuda" without values, kernels that are noted instead of launched.

Needs torch's CUDA build and no GPU. Legend: B batch, T or L tokens, H heads, P or D head width, N state, K channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the package triton is not installed (make setup-dev)")

from mvar.model import kernels
from mvar.model.kernels import fused
from tests.triton_compiler import Launch, recorded

GPU = torch.device("cuda", 0)
AMPERE, HOPPER = (8, 0), (9, 0)
OUR_KERNELS = [
    import_module(f"{kernels.__name__}.{module.name}")
    for module in iter_modules(kernels.__path__)
    if module.name.endswith("_triton")
]
LAYOUT = "aten._to_copy.default to cuda"
"""A crossing that attention may have: where the scales lie, sent once for a geometry."""
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Seen:
    """What happened on the machine so far."""

    launches: list[Launch]
    crossings: list[str]
    """Operations with tensors of both host and GPU, and where their results lie, such as LAYOUT."""

    def kernels(self) -> set[str]:
        """Files of our own kernels that something was launched from."""
        return {launch.kernel.__module__.rpartition(".")[2].removesuffix("_triton") for launch in self.launches}


@contextmanager
def gpu(*, chains: bool = True, capability: tuple[int, int] = HOPPER) -> Iterator[Seen]:
    """While this lasts, tensors have no values, and "cuda" is a GPU of that `capability`.

    `chains`: fused where we have kernels of our own; what torch would compile runs as it stands. At the end every
    launch must have had all its tensors on the GPU, their last dimension without gaps.
    """
    with ExitStack() as stack:
        _forget()
        stack.callback(_forget)
        stack.callback(fused.switch, fused._fused)
        fused.switch(chains)
        stack.enter_context(fused.eager())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.cuda, "device", _Starts)
        # Without these, autocast finds no GPU and stays off.
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        for name, package in _packages().items():
            patch.setitem(sys.modules, name, package)
        launches = stack.enter_context(recorded(*OUR_KERNELS))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        crossings = stack.enter_context(_Crossings())
        yield Seen(launches, crossings.found)
        assert not (faults := [fault for launch in launches for fault in _faults(launch)]), faults


def placed(make: Callable[[], M]) -> M:
    """A module that is made on the host, with values, and moved to the GPU. Within `gpu`."""
    return on_host(make).to(GPU)


def on_host(make: Callable[[], M]) -> M:
    """A module that is made on the host, with values. Within `gpu`."""
    with unset_fake_temporarily():
        return make()


def numbers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=GPU)


class _Crossings(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        result = operation(*args, **(options or {}))
        given, made = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, options), result))
        if len({tensor.device.type for tensor in given + made}) > 1:
            self.found.append(f"{operation} to {' and '.join(sorted({tensor.device.type for tensor in made}))}")
        return result


class _Starts(nullcontext[None]):
    """In the place of `torch.cuda.device`: where kernels start."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        assert device == GPU, f"a kernel is to start on {device}"


def _faults(launch: Launch) -> list[str]:
    found = []
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            told = f"{launch.kernel.__module__}.{launch.kernel.__name__}: {name} {tuple(value.shape)}"
            if value.device != GPU:
                found.append(f"{told} is on {value.device}")
            if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
                found.append(f"{told} has strides {value.stride()}")
    return found


def _forget() -> None:
    """What modules remember for a process: choices, imports, small tensors on the device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mvar."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _packages() -> dict[str, ModuleType]:
    """mamba-ssm, causal-conv1d and flash-attn, as far as they are called: results of the right kind, without values."""

    def convolution(x_BKL: Tensor, weight_KW: Tensor, bias_K: Tensor, initial_states: Any, activation: str) -> Tensor:
        return _made(x_BKL, x_BKL, weight_KW, bias_K, initial_states)

    def scan(
        x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B: Tensor, C: Tensor, *, D: Tensor, dt_bias: Tensor,
        initial_states: Tensor | None, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y_BLHP = _made(x_BLHP, x_BLHP, dt_BLH, A_H, B, C, D, dt_bias, initial_states)
        batch, _length, heads, width = x_BLHP.shape
        return y_BLHP, y_BLHP.new_empty(batch, heads, width, B.shape[-1], dtype=torch.float32)

    def mixer(
        zxbcdt_BLE: Tensor, weight_KW: Tensor, bias_K: Tensor, dt_bias_H: Tensor, A_H: Tensor, *, D: Tensor,
        rmsnorm_weight: Tensor, **_: Any,
    ) -> Tensor:  # fmt: skip
        like_BLI = zxbcdt_BLE[..., : len(rmsnorm_weight)]
        return _made(like_BLI, zxbcdt_BLE, weight_KW, bias_K, dt_bias_H, A_H, D, rmsnorm_weight)

    def attention(
        q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, bounds: Tensor, bounds_k: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        return _made(q_THD, q_THD, k_THD, v_THD, bounds, bounds_k)

    combined = _module(
        mamba_chunk_scan_combined=scan, mamba_split_conv1d_scan_combined=mixer, ensure_stride=lambda x: x
    )
    return {
        "causal_conv1d": _module(causal_conv1d_fn=convolution),
        "mamba_ssm": _module(),
        "mamba_ssm.ops": _module(),
        "mamba_ssm.ops.triton": _module(ssd_combined=combined),
        "flash_attn": _module(flash_attn_varlen_func=attention),
    }


def _module(**contents: Any) -> ModuleType:
    made = ModuleType("stand_in")
    vars(made).update(contents)
    return made


class _Made(torch.autograd.Function):
    """A tensor like the first one, which depends on all; each gradient is like its tensor."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(like, *tensors)
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if wanted else None for tensor, wanted in pairs)


def _made(like: Tensor, *tensors: Tensor | None) -> Tensor:
    devices = {tensor.device for tensor in tensors if tensor is not None}
    assert devices == {GPU}, f"a package is called with tensors on {devices}"
    out: Tensor = _Made.apply(like, *tensors)  # type: ignore[no-untyped-call]
    return out
