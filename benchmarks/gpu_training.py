"""Parts of `benchmarks.gpu` that train: ours through DeepSpeed, VAR in plain torch."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_context import Context, with_mixer
from benchmarks.gpu_profile import profile_training
from benchmarks.harness import spread
from mvar.config import MambaBackend
from mvar.plan.gpus import recognise


def train(context: Context, depth: int, batch: int, recompute: Any = "off", mamba: MambaBackend = "auto") -> None:
    """`mvar train`'s step through DeepSpeed, on made-up codes; with half the images where they do not fit."""
    from mvar.run import world as processes

    world = processes.start()
    images = context.scale.images(batch)
    while True:
        try:
            with tempfile.TemporaryDirectory() as folder:
                train_on(context, world, depth, images, recompute, mamba, Path(folder))
            break
        except torch.OutOfMemoryError:
            print(f"  {images} images do not fit", flush=True)
            if images < 8:
                raise
            images //= 2
        gc.collect()
        torch.cuda.empty_cache()
    processes.finish()


def train_on(
    context: Context, world: Any, depth: int, images: int, recompute: Any, mamba: MambaBackend, folder: Path
) -> None:
    from benchmarks.checkpoint import Run
    from mvar.config import TrainConfig
    from mvar.plan.flops import flops
    from mvar.plan.memory import Setup, memory
    from mvar.plan.sizes import Sizes

    name = f"train_d{depth}" + with_mixer(mamba)
    tree: dict[str, Any] = {
        "run": str(folder),
        "global_batch": images,
        "data": {"store": "none"},
        "model": {
            "depth": context.scale.depth(depth),
            "num_classes": 1000,
            "mamba_backend": context.mixer(mamba),
            **context.scale.geometry,
        },
        "engine": {"precision": "bf16", "ds_config": "ds_configs/zero2.json", "activation_checkpointing": recompute},
    }
    for key, value in context.overrides.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    config = TrainConfig.model_validate(tree)
    run = Run(config, world, made_up_weights())
    run.step()
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = context.timed(run.step, 8, 4)
    step_s, sizes = statistics.median(taken), Sizes.of(config.model)
    context.add(f"{name}_imgs_per_s", images / step_s, spread(taken) | {"batch": images, "recompute": recompute})
    context.add(f"{name}_step_ms", 1e3 * step_s)
    if context.device.type == "cuda":
        gpu = recognise(torch.cuda.get_device_name())
        if gpu is not None:
            context.add(f"{name}_mfu", images / step_s * flops(sizes).training / (gpu.bf16_tflops * 1e12))
        peak = torch.cuda.max_memory_allocated()
        context.add(f"{name}_peak_gib", peak / 2**30)
        setup = Setup(2, "bf16", 1, recompute=config.engine.activation_checkpointing)
        context.add(f"{name}_memory_vs_plan", peak / memory(sizes, setup, images).peak)
    if name == "train_d16":
        save(context, run, folder / "checkpoints")
        profile_training(context, name, run)


def made_up_weights() -> Callable[[str, tuple[int, ...]], Tensor]:
    """Values for a benchmark: true ones take a minute for a billion parameters."""
    pool = torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02

    def values(_name: str, shape: tuple[int, ...]) -> Tensor:
        numel = int(torch.Size(shape).numel())
        return pool.repeat(-(-numel // len(pool)))[:numel].view(shape)

    return values


def save(context: Context, run: Any, folder: Path) -> None:
    """How long saves in the background stop the training. The first allocates the buffer and is not counted."""
    from mvar.checkpoint.record import Identity
    from mvar.checkpoint.saver import Saver

    config, stalls = run.config, []
    saver = Saver(
        folder, run.engine.partition, run.engine.world, Identity(config, config.model, "0" * 64), config.checkpoint
    )
    for _ in range(2):
        saver.save(run.engine.progress(run.done))
        while not saver.ended:
            run.step()
        stalls += saver.settle()
    context.add("save_stall_s", stalls[-1].stall_s, {"seconds": stalls[-1].seconds, "first_stall_s": stalls[0].stall_s})


def train_var(context: Context, depth: int, batch: int) -> None:
    from benchmarks.var import VAR

    images = context.scale.images(batch)
    with context.device:
        model = VAR(context.scale.depth(depth), **context.scale.geometry)
        labels_B = torch.randint(1000, (images,))
        x_BLC = torch.randn(images, model.offsets[-1] - 1, 32)
        codes_BL = torch.randint(4096, (images, model.offsets[-1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16):
            logits_BLV = model(labels_B, x_BLC)
            loss = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()

    taken = context.timed(step, 5, 3)
    context.add(f"train_var{depth}_imgs_per_s", images / statistics.median(taken), spread(taken) | {"batch": images})
