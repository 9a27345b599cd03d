"""Runs the official Mamba-2 kernels on a CPU, in Triton's interpreter, and compares them with torch's backend.

`python -m tests.mamba_interpreter` prints one JSON object of largest relative differences. It patches torch and
replaces packages, so it belongs into a process of its own. float32 only: bfloat16 is wrong in the interpreter.
Legend: B batch, K channels, L tokens, W convolution width.
"""

import contextlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16
"""Chunk length here: the interpreter's time grows with the chunk, and short sequences shall cross a border."""


def install() -> None:
    """Make `mamba_ssm` and `causal_conv1d` importable without their compiled extensions. Call before importing them."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MAMBA_DETERMINISTIC"] = "1"  # one configuration for each kernel: nothing is timed to choose one
    os.environ.pop("TRITON_CACHE_AUTOTUNING", None)  # it would have all of them timed after all

    class NoDevice(contextlib.nullcontext[None]):
        def __init__(self, *_: Any) -> None:
            super().__init__()

    # The kernels' wrappers enter torch.cuda.device(None) and ask how many processors there are.
    torch.cuda.device = NoDevice  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=4)  # type: ignore[assignment]

    stand_in = types.ModuleType("causal_conv1d_cuda")
    stand_in.causal_conv1d_fwd = _conv_forward  # type: ignore[attr-defined]
    stand_in.causal_conv1d_bwd = _conv_backward  # type: ignore[attr-defined]
    stand_in.causal_conv1d_update = None  # type: ignore[attr-defined]
    sys.modules["causal_conv1d_cuda"] = stand_in

    # A package without its __init__, which imports Mamba-1's compiled extension.
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("mamba_ssm")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["mamba_ssm"] = package


def _taps(x_BKL: Tensor, initial_BKV: Tensor | None, width: int) -> Tensor:
    """What each tap of the convolution sees: (W, B, K, L)."""
    before = x_BKL.new_zeros(*x_BKL.shape[:2], width - 1) if initial_BKV is None else initial_BKV.to(x_BKL.dtype)
    rows = torch.cat((before, x_BKL), dim=-1)
    return torch.stack([rows[..., tap : tap + x_BKL.shape[-1]] for tap in range(width)])


def _conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, seq_idx: None, initial: Tensor | None, out: Tensor, final: None, silu: bool
) -> None:
    """The extension's forward call, for what our code asks of it. It checks the layout as the extension does."""
    assert seq_idx is None and final is None
    assert x.stride(1) == 1 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "rows must begin at multiples of 8"
    assert initial is None or (initial.dtype == x.dtype and initial.stride(1) == 1)
    pre = torch.einsum("wbkl,kw->bkl", _taps(x, initial, weight.shape[1]), weight) + bias[:, None]
    out.copy_(F.silu(pre) if silu else pre)


def _conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dout: Tensor,
    seq_idx: None,
    initial: Tensor | None,
    dfinal: None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dinitial: Tensor | None,
    silu: bool,
) -> None:
    """The extension's backward call. Written out: autograd is off inside a custom operator."""
    assert seq_idx is None and dfinal is None and silu
    width = weight.shape[1]
    taps = _taps(x, initial, width)
    pre = torch.einsum("wbkl,kw->bkl", taps, weight) + bias[:, None]
    dpre = torch.ops.aten.silu_backward(dout, pre)
    dlong = torch.zeros(*x.shape[:2], x.shape[2] + width - 1)
    for tap in range(width):
        dlong[..., tap : tap + x.shape[2]] += dpre * weight[:, tap, None]
    dx.copy_(dlong[..., width - 1 :])
    dweight.copy_(torch.einsum("wbkl,bkl->kw", taps, dpre))
    dbias.copy_(dpre.sum((0, 2)))


def compare() -> dict[str, float]:
    """Largest differences, relative to the largest value, between the official kernels and torch's backend."""
    from mvar.model.kernels import mamba_ssm as mamba_kernels
    from mvar.model.mamba2 import Mamba2, MambaState

    def pair(width: int) -> tuple[Mamba2, Mamba2]:
        torch.manual_seed(0)
        ours, official = Mamba2(width, backend="torch"), Mamba2(width, backend="mamba_ssm")
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        torch.nn.init.uniform_(ours.A_log, 0.0, 2.5)
        torch.nn.init.uniform_(ours.dt_bias, -4.0, -1.0)
        official.load_state_dict(ours.state_dict())
        return ours, official

    def difference(found: Tensor, expected: Tensor) -> float:
        return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())

    mamba_kernels.CHUNK = CHUNK
    figures: dict[str, float] = {}
    # Rows of 1,160 and of 386 elements.
    for name, width, images in (("fused", 256, 1), ("odd", 64, 2), ("unfused", 64, 2)):
        ours, official = pair(width)
        if name == "unfused":  # as with a mamba-ssm that does not copy odd rows
            mamba_kernels.fusable = lambda _: False
        u = torch.randn(images, CHUNK + 1, width)
        inputs = [u.clone().requires_grad_() for _ in range(2)]
        outputs = [ours(inputs[0]), official(inputs[1])]
        figures[f"{name}_output"] = difference(outputs[1], outputs[0])
        cotangent = torch.randn_like(u)
        for output in outputs:
            output.backward(cotangent)
        figures[f"{name}_grad_input"] = difference(inputs[1].grad, inputs[0].grad)  # type: ignore[arg-type]
        for parameter_name, parameter in ours.named_parameters():
            gradient = official.get_parameter(parameter_name).grad
            figures[f"{name}_grad_{parameter_name}"] = difference(gradient, parameter.grad)  # type: ignore[arg-type]

    ours, official = pair(64)
    u = torch.randn(2, 30, 64)
    whole = ours(u).detach()
    states, start = [MambaState(), MambaState()], 0
    for length in (1, 4, 9, 16):
        piece = u[:, start : start + length]
        ours(piece, states[0])
        with torch.no_grad():
            out = official(piece, states[1])
        key = f"carried_{length}"
        figures[f"{key}_output"] = difference(out, whole[:, start : start + length])
        assert states[0].ssm_BHPN is not None and states[0].tail_BVK is not None
        assert states[1].ssm_BHPN is not None and states[1].tail_BVK is not None
        figures[f"{key}_state"] = difference(states[1].ssm_BHPN, states[0].ssm_BHPN)
        figures[f"{key}_tail"] = difference(states[1].tail_BVK, states[0].tail_BVK)
        start += length
    return figures


if __name__ == "__main__":
    install()
    torch.set_num_threads(1)
    print(json.dumps(compare()))
