"""What well-known GPUs can do: memory, the peak of dense bf16 matmuls and links, by their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mvar.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    name: str
    memory_gib: float
    """As sold; some of it is the driver's."""
    bf16_tflops: float
    """Dense matmuls with fp32 accumulation, 10^12 operations a second."""
    also: tuple[str, ...] = ()
    """Words that `torch.cuda.get_device_name` may have for it, all of them together."""
    link_gb_s: float = 25.0
    """To its neighbours of a node, GB/s in one direction: NVLink or Infinity Fabric, else PCIe."""
    mig_slices: int = 7
    """Parts that its multiprocessors can be divided into."""

    @property
    def usable_bytes(self) -> int:
        """What a training may fill: nine tenths. The rest is CUDA's context, NCCL's buffers and fragmentation."""
        return int(0.9 * self.memory_gib * GIB)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100-16gb", 16, 125, ("v100", "16gb"), link_gb_s=150),  # fp16: it has no bf16.
        Gpu("v100-32gb", 32, 125, ("v100", "32gb"), link_gb_s=150),
        Gpu("a10-24gb", 24, 125, ("a10",)),
        Gpu("a30-24gb", 24, 165, ("a30",), mig_slices=4),
        Gpu("a40-48gb", 48, 150, ("a40",)),
        Gpu("rtxa6000-48gb", 48, 155, ("a6000",)),
        Gpu("l4-24gb", 24, 121, ("l4",)),
        Gpu("l40-48gb", 48, 181, ("l40",)),
        Gpu("l40s-48gb", 48, 362, ("l40s",)),
        Gpu("rtx4090-24gb", 24, 165, ("4090",)),
        Gpu("rtx6000ada-48gb", 48, 364, ("6000", "ada")),
        Gpu("a100-40gb", 40, 312, ("a100", "40gb"), link_gb_s=300),
        Gpu("a100-80gb", 80, 312, ("a100", "80gb"), link_gb_s=300),
        Gpu("h100-80gb", 80, 989, ("h100",), link_gb_s=450),
        Gpu("h100-pcie-80gb", 80, 756, ("h100", "pcie"), link_gb_s=55),
        Gpu("h100-nvl-94gb", 94, 835, ("h100", "nvl"), link_gb_s=55),
        Gpu("h20-96gb", 96, 148, ("h20",), link_gb_s=450),
        Gpu("h200-141gb", 141, 989, ("h200",), link_gb_s=450),
        Gpu("gh200-96gb", 96, 989, ("gh200",), link_gb_s=450),
        Gpu("b200-192gb", 192, 2250, ("b200",), link_gb_s=900),
        Gpu("mi250x-128gb", 128, 383, ("mi250x",), link_gb_s=50),
        Gpu("mi300x-192gb", 192, 1307, ("mi300x",), link_gb_s=448),
    )
}


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError with the known names."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name}: unknown. Known: {', '.join(GPUS)}. Or give --memory-gib and --peak-tflops.")
    return gpu


_MIG = re.compile(r" mig (?:(?P<compute>\d+)c\.)?(?P<slices>\d+)g\.(?P<memory_gib>\d+)gb")


def recognise(device_name: str) -> Gpu | None:
    """The GPU that torch calls so, such as "NVIDIA A100-SXM4-80GB"; None if it is none of ours.

    A slice, such as "NVIDIA A100-SXM4-40GB MIG 3g.20gb", is its share of the whole one.
    """
    said = device_name.lower()
    words = set(_MIG.sub("", said).replace("-", " ").split())
    fitting = [gpu for gpu in GPUS.values() if gpu.also and set(gpu.also) <= words]
    whole = max(fitting, key=lambda gpu: len(gpu.also), default=None)
    if whole is None or not (mig := _MIG.search(said)):
        return None if whole is None or "mig" in words else whole
    share = int(mig["compute"] or mig["slices"]) / whole.mig_slices
    name = f"{whole.name}-mig-{mig[0].removeprefix(' mig ')}"
    return replace(whole, name=name, memory_gib=int(mig["memory_gib"]), bf16_tflops=whole.bf16_tflops * share)
