"""What a training is, before anything of its size is allocated: configuration, store, plan, batches, all checked."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass, replace

import numpy as np
import torch

from mvar import ds_config
from mvar.checkpoint.record import Identity, Progress
from mvar.checkpoint.saver import available_memory
from mvar.config import ModelConfig, ReaderKind, TrainConfig
from mvar.data.manifest import MANIFEST
from mvar.data.store import CodeStore
from mvar.data.stream import TrainStream
from mvar.ds_config import BatchSplit
from mvar.errors import ConfigError, TokenizerError
from mvar.files.disk import sha256_of
from mvar.log import log
from mvar.plan.room import require_room
from mvar.run.shared_memory import shared_array
from mvar.run.world import World
from mvar.schedule import BatchPhase, Plan
from mvar.version import __version__


@dataclass(frozen=True)
class TrainingJob:
    """Everything that follows from configuration, store and number of ranks."""

    config: TrainConfig
    model: ModelConfig
    """With the number of classes."""
    store: CodeStore
    store_sha256: str
    plan: Plan
    split: BatchSplit
    stream: TrainStream

    @property
    def identity(self) -> Identity:
        return Identity(self.config, self.model, self.store_sha256, versions())


def prepare(config: TrainConfig, ranks: int, ranks_here: int = 1) -> TrainingJob:
    """Open and check what the run needs, before anything is allocated. `ranks_here`: those of this machine.

    Raises MvarError.
    """
    split = BatchSplit.of(config.global_batch, ranks, config.engine.micro_batch)
    tree = ds_config.resolve(config, split)
    # What is read into memory is read once a machine, by `hold_codes`.
    reader: ReaderKind = "mmap" if config.data.reader == "ram" else config.data.reader
    store = CodeStore.open(config.data.store, reader=reader, stage=config.data.stage)
    store.require_geometry(config.model.patch_nums, config.model.vocab_size, config.model.latent_channels)
    labelled = len(store.manifest.classes)
    classes = config.model.num_classes or labelled
    if classes < labelled:
        raise ConfigError(
            f"model.num_classes {classes}: the code store {config.data.store} has {labelled} classes."
            " Leave the key out to take the store's number."
        )
    model = config.model.model_copy(update={"num_classes": classes})
    require_room(config, model, tree["zero_optimization"], ranks, ranks_here)
    if config.tracking.evaluate_every and config.tracking.evaluate_reference is None:
        raise ConfigError("tracking.evaluate_every needs tracking.evaluate_reference, a file that mvar reference made.")
    for name in ("sample_every", "evaluate_every"):
        if getattr(config.tracking, name):
            check_tokenizer(config, store, f"tracking.{name}")
    return TrainingJob(
        config=config,
        model=model,
        store=store,
        store_sha256=hashlib.sha256((store.folder / MANIFEST).read_bytes()).hexdigest(),
        plan=Plan.of(config, len(store.split("train"))),
        split=split,
        stream=TrainStream(store.split("train"), config.seed, config.global_batch),
    )


def hold_codes(job: TrainingJob, world: World) -> None:
    """With data.reader=ram: have all codes in memory, once for all ranks of a machine. All ranks together.

    Where that cannot be, codes are read from the files as they are asked for. Raises StoreError.
    """
    if job.config.data.reader != "ram":
        return
    for name in ("train", "val"):
        split = job.store.split(name)
        codes, problem = shared_array(world, split.shape, np.uint16, split.fill, available_memory())
        if codes is not None:
            split.hold(codes)
        else:
            log.warning("data.reader=ram: %s. The %s split is read from its files instead.", problem, name)


def check_tokenizer(config: TrainConfig, store: CodeStore, asked_by: str) -> None:
    path = config.data.tokenizer
    if path is None:
        raise ConfigError(f"{asked_by} needs data.tokenizer, the tokenizer that the store was made with.")
    if not path.is_file():
        raise TokenizerError(f"data.tokenizer {path}: no such file. Give the tokenizer that the store was made with.")
    ours, theirs = sha256_of(path), store.manifest.tokenizer.sha256
    if ours != theirs:
        raise TokenizerError(
            f"data.tokenizer {path} (sha256 {ours[:12]}) did not make the code store {store.folder} ({theirs[:12]})."
            f" Its pictures would be noise. Give the one that did, or set {asked_by}=0."
        )


def going_on(job: TrainingJob, progress: Progress) -> TrainingJob:
    """The job with the plan of a run that has come so far, perhaps with another global batch from here on."""
    batch = job.config.global_batch
    phases = progress.stretches
    if not phases or phases[-1].global_batch != batch:
        phases += (BatchPhase(progress.step, progress.samples, batch),)
    return replace(job, plan=Plan.of(job.config, len(job.store.split("train")), phases))


def versions() -> dict[str, str]:
    return {
        "mvar": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "deepspeed": importlib.metadata.version("deepspeed"),
    }


def summary(job: TrainingJob, parameters: int, stage: int) -> str:
    plan, split, config = job.plan, job.split, job.config
    return (
        f"{parameters:,} parameters, {job.model.num_classes} classes,"
        f" {len(job.store.split('train')):,} training and {len(job.store.split('val')):,} validation images\n"
        f"  {plan.last_step:,} steps of {split.global_batch} images = {split.ranks} ranks x {split.micro_batch}"
        f" x {split.accumulation} accumulated; {plan.warmup_steps:,} of {plan.total_steps:,} steps warm up"
        f" to lr {plan.peak_lr:.3g}\n"
        f"  ZeRO stage {stage}, {config.engine.precision}; accuracy is per token: 4-6 % is normal with 4,096 words"
    )
