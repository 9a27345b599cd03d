"""What is left on the host, or comes from there, is seen: so the tests beside this one can fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from mvar.config import ActivationCheckpointing
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from mvar.training.objective import Objective
from tests.fake_cuda.backward import gradients
from tests.fake_cuda.machine import GPU, gpu, numbers, on_host, placed
from tests.fake_cuda.models import IMAGES, TOKENS, learn, tokenizer, transformer

pytestmark = pytest.mark.fake_cuda


@pytest.mark.parametrize("left", ["lvl_embed", "head", "word_embed"])
def test_a_module_on_the_host(left: str) -> None:
    with gpu() as seen:
        model = placed(transformer)
        setattr(model, left, getattr(on_host(transformer), left))
        with pytest.raises(RuntimeError, match="device"):
            learn(seen, model)


def leave(model: MVAR, module: str, parameter: str) -> None:
    left = getattr(on_host(transformer).get_submodule(module), parameter)
    model.get_submodule(module).register_parameter(parameter, left)


def test_an_argument_of_our_kernels_on_the_host() -> None:
    """No operation of torch's sees the heads' scales beside anything on the GPU."""
    with pytest.raises(AssertionError, match=r"scale_ptr .* is on cpu"), gpu():
        model = placed(lambda: transformer(torch.bfloat16, mamba_backend="torch"))
        leave(model, "blocks.1.attn", "scale_mul_1H11")
        with torch.no_grad():
            model(numbers(IMAGES), torch.zeros(IMAGES, TOKENS - 1, 4, device=GPU))


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_an_argument_of_a_package_on_the_host(parameter: str) -> None:
    with gpu() as seen:
        model = placed(lambda: transformer(torch.bfloat16, mamba_backend="mamba_ssm"))
        leave(model, "blocks.0.mamba.conv1d", parameter)
        with pytest.raises(AssertionError, match=r"a package is called with tensors on .*cpu"):
            learn(seen, model)


def test_rows_with_gaps_in_front_of_our_kernels() -> None:
    from mvar.model.kernels import scale_attention_triton

    with pytest.raises(AssertionError, match=r"scale_ptr .* has strides"), gpu():
        qkv_BL3HD = torch.zeros(1, 1, 3, 2, 32, device=GPU)
        scale_H = torch.ones(2, 2, device=GPU)[:, 0]
        scale_attention_triton.attend(qkv_BL3HD, scale_H, (1,), 1.0, 1e-12)


def test_a_kernel_that_starts_on_another_gpu() -> None:
    with gpu(), pytest.raises(AssertionError, match="start on cuda:1"), torch.cuda.device(torch.device("cuda", 1)):
        pass


@pytest.mark.parametrize(
    ("operation", "crossing"),
    [
        (lambda x: x[torch.zeros(1, dtype=torch.int64)], "aten.index.Tensor to cuda"),
        (lambda x: x.cpu(), "aten._to_copy.default to cpu"),
        (lambda x: x + torch.ones(()), "aten.add.Tensor to cuda"),
    ],
)
def test_what_torch_lets_cross(operation: Callable[[Tensor], Tensor], crossing: str) -> None:
    with gpu() as seen:
        operation(torch.zeros(3, device=GPU))
    assert seen.crossings == [crossing]


def test_a_value_read_by_the_host() -> None:
    with gpu(), pytest.raises(DataDependentOutputException):
        bool(torch.zeros(1, device=GPU).any())


class Astray(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
        return dx.cpu()


def test_a_gradient_on_the_host() -> None:
    with gpu():
        weight = nn.Parameter(torch.ones(3, device=GPU))
        with pytest.raises(AssertionError, match=r"AstrayBackward gives cpu to .*, which is on cuda:0"):
            gradients(Astray.apply(weight).sum())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("checkpointing", ["off", "every", "selective"])
def test_gradients_are_those_of_torch_s_engine(checkpointing: ActivationCheckpointing) -> None:
    """With values, on the host."""
    torch.manual_seed(0)
    model = transformer(activation_checkpointing=checkpointing)
    init_weights_(model, 0, init_gamma=0.3, init_head=1.0)
    objective = Objective(tokenizer().quantizer, torch.device("cpu"), label_smoothing=0.1)
    codes_BL, labels_B = torch.randint(0, 16, (IMAGES, TOKENS)), torch.tensor([0, 4])
    step = functools.partial(objective, model, codes_BL, labels_B)
    found = gradients(step().loss)
    step().loss.backward()
    assert found.keys() == set(model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[parameter], parameter.grad, msg=name)
