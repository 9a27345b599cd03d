"""What a Triton kernel becomes on a GPU, found out without one: launches are recorded, then compiled for a target."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
_OPTIONS = ("num_warps", "num_stages")
ALIGNED = 16


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def compiled_for(self, architecture: int) -> Binary:
        """As the launch itself would compile it on `architecture` (90: sm_90)."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for parameter in self.kernel.params:
            value, at = self.arguments[parameter.name], (parameter.num,)
            one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name], constants[at] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[parameter.name], number = f"*{_TYPES[value.dtype]}", value.data_ptr()
            else:
                signature[parameter.name], number = ("fp32", 1) if isinstance(value, float) else ("i32", value)
            if number % ALIGNED == 0 and not parameter.do_not_specialize:
                attributes[at] = [["tt.divisibility", ALIGNED]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=self.options)
        return Binary.of(made)


@dataclass(frozen=True)
class Binary:
    """Resources of a compiled kernel. Any stack means that registers were spilled."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    ptx: str

    @classmethod
    def of(cls, made: Any) -> Binary:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
        assert found is not None, printed
        return cls(
            int(found[1]), int(found[2]), int(made.metadata.shared), int(made.metadata.num_warps), made.asm["ptx"]
        )


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Launches of the modules' kernels, in order, instead of their execution. Results are whatever memory held."""
    launches: list[Launch] = []

    def recorder(kernel: Any) -> Any:
        def run(*values: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
            options = {name: named.pop(name) for name in _OPTIONS if name in named}
            launches.append(Launch(kernel, grid, dict(zip(kernel.arg_names, values, strict=False)) | named, options))

        return mock.patch.object(kernel, "run", run)

    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    patches = [recorder(kernel) for kernel in kernels]
    for patch in patches:
        patch.start()
    try:
        yield launches
    finally:
        for patch in patches:
            patch.stop()
