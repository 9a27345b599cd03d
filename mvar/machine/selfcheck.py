"""What a machine is made to prove before it trains: that it multiplies, remembers and writes right, and how fast.

Each rank tests its own device, the first rank of a machine also the disk and what the driver says of the GPUs. One that
gave a wrong result is bad whatever the others say; one that is slow is so beside machines of its kind.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvar.machine.findings import Finding
from mvar.machine.hardware import said_by
from mvar.randomness import hash64

VARIABLE = "MVAR_NODE_CHECK"
MIB = 2**20
TIMES, ENOUGH_S = 5, 0.3
"""Each product is made so often, or until so many seconds are over, but once at least."""
LENGTH = 256
"""Of the rows that are multiplied. Entries are -1, 0 and 1, so products are whole numbers up to 256: no rounding in any
type or order, down to bf16."""
SIDE = {"cpu": 512, "cuda": 8192}
MEMORY_MIB = {"cpu": 64, "cuda": 1024}
DISK_MIB = 16
LEAST_FREE_MIB = 256
SLOW: dict[str, float] = {"product": 0.5, "memory": 0.5, "disk": 0.1}
"""Share of the median machine's rate below which one is slow."""
GPU_FIELDS = ("index", "uuid", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending")
ROW_FIELDS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")


@dataclass(frozen=True)
class Proof:
    """One thing that was tried. `problem`: proof that the machine is bad; `rate`: more is better, comparable among
    machines of one `kind`."""

    name: str
    text: str
    problem: str | None = None
    rate: float | None = None
    kind: str = ""

    @property
    def finding(self) -> Finding:
        return Finding(self.name, self.problem or self.text, "bad" if self.problem else "good")


@dataclass(frozen=True)
class Verdict:
    """What speaks against a rank's machine. `out`: it is not to be used."""

    rank: int
    what: str
    evidence: str
    out: bool


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Jobs of Slurm do it, unless MVAR_NODE_CHECK=off; others with MVAR_NODE_CHECK=on."""
    return environ.get(VARIABLE, "on" if "SLURM_JOB_ID" in environ else "off") != "off"


def try_rank(device: torch.device, folders: Sequence[Path], *, first_here: bool) -> list[Proof]:
    """Everything that this rank tests. `folders`: where this machine keeps files of its own."""
    done = [guarded("product", partial(product, device, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    done.append(guarded("memory", partial(memory, device)))
    if first_here:
        for folder in dict.fromkeys([own_folder(), *folders]):
            done.append(guarded("disk", partial(disk, folder)))
        done += gpu_errors()
    return done


def try_machine() -> list[Proof]:
    """Every GPU that this process sees (without any, the CPU), and what the first rank would test."""
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    first, *others = gpus or [torch.device("cpu")]
    return [*try_rank(first, [], first_here=True), *(t for gpu in others for t in try_rank(gpu, [], first_here=False))]


def guarded(name: str, test: Callable[[], Proof]) -> Proof:
    """A test that cannot even be made is a problem, too."""
    try:
        return test()
    except (RuntimeError, OSError) as error:
        return Proof(name, "", f"{name} test failed: {type(error).__name__}: {str(error).splitlines()[0]}")


def own_folder(environ: Mapping[str, str] = os.environ) -> Path:
    cache = environ.get("MVAR_CACHE")
    return Path(cache) if cache and Path(cache).is_dir() else Path(tempfile.gettempdir())


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def product(device: torch.device, dtype: torch.dtype) -> Proof:
    """A product of matrices beside its sums over rows and columns, which are known without it, exactly."""
    side = SIDE[device.type]
    a = _ternary(side, LENGTH, 1).to(device, dtype)
    b = _ternary(LENGTH, side, 2).to(device, dtype)
    rows, columns = a.double() @ b.double().sum(dim=1), a.double().sum(dim=0) @ b.double()
    kind, best_s, begin_s = _kind(device), float("inf"), time.perf_counter()
    for _ in range(TIMES):
        _wait(device)
        since_s = time.perf_counter()
        c = multiply(a, b)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - since_s)
        wrong = (
            int((c.sum(1, dtype=torch.float64) != rows).sum()),
            int((c.sum(0, dtype=torch.float64) != columns).sum()),
        )
        if any(wrong):
            text = f"a product of matrices in {_name(dtype)} is wrong: {wrong[0]} of {side} rows and {wrong[1]} columns"
            return Proof("product", "", f"{text} have another sum than they must")
        if time.perf_counter() - begin_s > ENOUGH_S:
            break
    rate = 2 * side * side * LENGTH / best_s
    return Proof("product", f"right, {rate / 1e12:.3g} TFLOP/s in {_name(dtype)}", None, rate, f"{kind} {_name(dtype)}")


def _ternary(rows: int, columns: int, seed: int) -> Tensor:
    numbers = hash64(seed, "selfcheck", np.arange(rows * columns)) % np.uint64(3)
    return torch.from_numpy(numbers.astype(np.float32) - 1).view(rows, columns)


def memory(device: torch.device) -> Proof:
    """A pattern and its complement, copied and compared."""
    count = MEMORY_MIB[device.type] * MIB // 8
    if device.type == "cuda":
        count = min(count, torch.cuda.mem_get_info(device)[0] // 32)
    pattern = torch.arange(count, device=device).mul_(0x9E3779B97F4A7C1)
    best_s = float("inf")
    for _ in range(2):
        _wait(device)
        since_s = time.perf_counter()
        copied = pattern.clone()
        _wait(device)
        best_s = min(best_s, time.perf_counter() - since_s)
        wrong = int((copied != pattern).sum())
        if wrong:
            return Proof("memory", "", f"{wrong} of {count} words differ from what they were copied from")
        pattern.bitwise_not_()
    rate = 2 * 8 * count / best_s
    return Proof("memory", f"right, {rate / 1e9:.3g} GB/s copied", None, rate, _kind(device))


def disk(folder: Path) -> Proof:
    """A file written, synced, dropped from memory and read back; and what room is left."""
    free = shutil.disk_usage(folder).free / MIB
    if free < LEAST_FREE_MIB:
        return Proof("disk", "", f"{folder}: {free:.0f} MiB are free, {LEAST_FREE_MIB} are needed")
    data = hash64(3, "selfcheck", np.arange(DISK_MIB * MIB // 8)).tobytes()
    with tempfile.TemporaryFile(dir=folder, prefix=".mvar-check-", buffering=0) as file:
        since_s = time.perf_counter()
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
        rate = len(data) / (time.perf_counter() - since_s)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        read = b"".join(iter(lambda: file.read(MIB), b""))
    if read != data:
        return Proof("disk", "", f"{folder}: a file of {DISK_MIB} MiB is read back other than it was written")
    return Proof("disk", f"{folder}: right, {rate / 1e6:.0f} MB/s written, {free / 1024:.0f} GiB free", None, rate)


def gpu_errors(ask: Callable[[list[str]], str | None] = said_by) -> list[Proof]:
    """What the driver counted since it was loaded. Nothing where there is no nvidia-smi, or a GPU does not count."""
    problems: list[str] = []
    for line in _rows(ask, "gpu", GPU_FIELDS):
        _, gpu, uncorrected, pending = line
        if uncorrected.isdigit() and int(uncorrected):
            problems.append(f"GPU {gpu}: {uncorrected} memory errors that could not be corrected")
        if pending.lower() == "yes":
            problems.append(f"GPU {gpu}: pages of memory wait to be retired")
    for gpu, pending, failure in _rows(ask, "remapped-rows", ROW_FIELDS):
        if failure.lower() in ("yes", "1"):
            problems.append(f"GPU {gpu}: rows of memory could not be remapped")
        elif pending.lower() in ("yes", "1"):
            problems.append(f"GPU {gpu}: rows of memory wait to be remapped: it needs a reset")
    return [Proof("GPU errors", "", problem) for problem in problems]


def _rows(ask: Callable[[list[str]], str | None], what: str, fields: tuple[str, ...]) -> list[list[str]]:
    said = ask(["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]) or ""
    rows = [[field.strip() for field in line.split(",")] for line in said.splitlines()]
    return [row for row in rows if len(row) == len(fields)]


def verdicts(tested_R: Sequence[Sequence[Proof]]) -> list[Verdict]:
    """What speaks against whom, given what every rank tested."""
    found = []
    rates: dict[tuple[str, str], list[float]] = {}
    for tested in tested_R:
        for test in tested:
            if test.rate is not None:
                rates.setdefault((test.name, test.kind), []).append(test.rate)
    for rank, tested in enumerate(tested_R):
        for test in tested:
            if test.problem is not None:
                found.append(Verdict(rank, "self-check", test.problem, out=True))
            elif test.rate is not None:
                usual = statistics.median_high(rates[test.name, test.kind])
                if test.rate < SLOW[test.name] * usual:
                    share = f"{test.rate / usual:.2f} of the median machine's rate"
                    evidence = f"{test.name}: {test.text}: {share}"
                    found.append(Verdict(rank, "slow in its self-check", evidence, out=False))
    return found


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
