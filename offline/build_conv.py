"""Build causal-conv1d's extension for one architecture: its own setup.py builds nine, one file after the other.

    python3 build_conv.py SOURCES OUT ARCH       such as src/causal_conv1d-1.7.0 causal_conv1d_cuda.so 9.0

Each pair of types is compiled by itself, so that as many cores as there are help: a file instantiates nine pairs, and
the slowest of the package's three files takes as long as all others together.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

INSTANTIATION = re.compile(r"^template void \w+<(.+?)>\(.*\);\n", re.MULTILINE)
KERNELS = ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update")


def split(source: str) -> dict[str, str]:
    """Source texts that together instantiate what `source` does: one for each tuple of types, by its place."""
    types = dict.fromkeys(match[1] for match in INSTANTIATION.finditer(source))
    return {str(number): _only(source, kept) for number, kept in enumerate(types)}


def _only(source: str, kept: str) -> str:
    return INSTANTIATION.sub(lambda match: match[0] if match[1] == kept else "", source)


def cuda_home() -> Path:
    """The CUDA toolkit of the nvcc that is found. Raises SystemExit where there is none."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    if nvcc is not None:
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for home in candidates:
        if (home / "include/cuda_runtime.h").is_file() and (home / "bin/nvcc").is_file():
            return home
    raise SystemExit("build_conv: no CUDA toolkit (nvcc with its headers) found: set CUDA_HOME.")


def build(sources: Path, out: Path, arch: str) -> None:
    """Leave the extension at `out`. `arch`: such as 9.0."""
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    os.environ["CUDA_HOME"] = str(cuda_home())
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    import torch
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(prefix="causal_conv1d-") as name:
        work = Path(name)
        files = [sources / "csrc/causal_conv1d.cpp"]
        for kernel in KERNELS:
            for number, text in split((sources / f"csrc/{kernel}.cu").read_text()).items():
                files.append(work / f"{kernel}_{number}.cu")
                files[-1].write_text(text)
        # CUDA's headers may come as Python packages beside torch.
        packaged = map(str, Path(torch.__file__).parent.parent.glob("nvidia/cu1*/include"))
        allowed = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS")
        allowed += ("BFLOAT162_OPERATORS", "BFLOAT162_CONVERSIONS")
        cpp_extension.load(
            name="causal_conv1d_cuda",
            sources=[str(file) for file in files],
            extra_include_paths=[str(sources / "csrc"), *packaged],
            extra_cflags=["-O3"],
            extra_cuda_cflags=[
                "-O3",
                *(f"-U__CUDA_NO_{name}__" for name in allowed),
                "--expt-relaxed-constexpr",
                "--expt-extended-lambda",
                "--use_fast_math",
            ],
            build_directory=name,
            with_cuda=True,
            is_python_module=False,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(work.glob("causal_conv1d_cuda*.so")), out)


def main(argv: Sequence[str]) -> int:
    if len(argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    began_s = time.monotonic()
    build(Path(argv[0]).resolve(), Path(argv[1]).resolve(), argv[2])
    print(f"causal-conv1d built in {time.monotonic() - began_s:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
