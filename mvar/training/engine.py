"""The model on DeepSpeed: built, stepped, evaluated, saved and restored, the same way for every ZeRO stage.

The engine is told everything that changes from step to step (which step it is, which samples) and keeps nothing but
weights, moments and fp16's loss scale.

Shapes: B images, L tokens, S scales, D blocks, G residual branches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvar import ds_config, randomness
from mvar.checkpoint.loading import restore
from mvar.checkpoint.partition import EMA, WEIGHT, Partition, Piece
from mvar.checkpoint.record import Progress
from mvar.config import ModelConfig, OptimConfig, TrainConfig
from mvar.data.stream import Batch
from mvar.ds_config import BatchSplit
from mvar.errors import BackendError, ConfigError
from mvar.model.choices import choices
from mvar.model.init import Initializer
from mvar.model.kernels import fused
from mvar.model.kernels.arithmetic import Arithmetic
from mvar.model.mamba2 import DECAYS, Mamba2
from mvar.model.transformer import MVAR, drop_path_rates
from mvar.run.world import World
from mvar.schedule import Plan, decays
from mvar.training.objective import Losses, Objective
from mvar.training.zero_norm import shorten


@dataclass(frozen=True)
class Averages:
    """Means over images and tokens, over all ranks. Cross entropies in nats per token."""

    images: int
    loss: float
    loss_per_scale: list[float]
    accuracy: float
    accuracy_per_scale: list[float]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as all ranks know it."""

    averages: Averages
    grad_norm: float | None
    """Before clipping; None where it is not finite."""
    lr: float
    weight_decay: float
    skipped: bool
    """No update was made: loss or gradient was not finite (fp16: or overflowed, and the loss scale went down)."""
    bad_samples: list[int]
    """Samples (numbers in the train split) whose loss was not finite."""
    loss_scale: float | None
    votes: tuple[int, ...]
    """How many ranks said yes to each of the questions that were put to the vote."""


def build_model(config: TrainConfig, model: ModelConfig) -> MVAR:
    assert model.num_classes is not None
    return MVAR.from_config(
        model, num_classes=model.num_classes, activation_checkpointing=config.engine.activation_checkpointing
    )


class Engine:
    """A model in training. All methods are called by all ranks together.

    `model`: configuration with the number of classes. `split`: how the global batch lies over ranks. After building,
    call `initialise` or `restore`. Raises ConfigError, BackendError.
    """

    def __init__(
        self, config: TrainConfig, model: ModelConfig, plan: Plan, split: BatchSplit, objective: Objective, world: World
    ) -> None:
        self.config, self.plan, self.split, self.objective, self.world = config, plan, split, objective, world
        self._model_config = model
        tree = ds_config.resolve(config, split)
        _check_accelerator(config)
        self.stage = int(tree["zero_optimization"]["stage"])
        arithmetic = Arithmetic.of(config.engine.precision, config.engine.tf32, world.device)
        arithmetic.apply()
        self.choices = choices(model, arithmetic, config.engine.compile)
        """How this run computes, by name."""
        fused.switch(self.choices["compile"].name == "on")
        self._engine, client = self._initialize(tree)
        self._optimizer = client
        self.partition = Partition(self._engine, client, ema=config.optim.ema_decay > 0)
        self._scaler: Any = getattr(self._engine.optimizer, "loss_scaler", None) if _is_fp16(config) else None
        modules: Any = self._engine.module.named_modules()
        self._mixers = {name: module for name, module in modules if isinstance(module, Mamba2)}
        self._rates_D = drop_path_rates(model.depth, model.resolved_drop_path)
        self._last: tuple[Tensor, NDArray[np.int64]] | None = None
        """Losses and samples of this rank's last step."""
        self.skipped_steps = 0

    def _initialize(self, tree: ds_config.Tree) -> tuple[Any, torch.optim.Optimizer]:
        import deepspeed

        sharded = deepspeed.zero.Init(config_dict_or_path=tree) if self.stage == 3 else contextlib.nullcontext()
        with sharded:
            model = build_model(self.config, self._model_config)
        devices = dict(ds_config.offloads(tree))
        client = make_optimizer(parameter_groups(model), self.config.optim, self.plan.peak_lr, devices)
        engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=tree)
        shorten(engine.optimizer)
        return engine, client

    @property
    def model(self) -> nn.Module:
        """What to call for logits. Everything must go through it: under ZeRO-3 weights exist only during the call."""
        module: nn.Module = self._engine
        return module

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.partition.shapes.values())

    def initialise(self, values: Callable[[str, tuple[int, ...]], Tensor] | None = None) -> None:
        """Fill in the weights a training starts from: `values(name, shape)`, by default a function of (seed, name)."""
        values = values or self._initializer().value
        shapes = self.partition.shapes

        def initial(piece: Piece, kind: str) -> Tensor | None:
            if kind not in (WEIGHT, EMA):
                return None
            return values(piece.name, shapes[piece.name]).flatten()[piece.start : piece.stop]

        self.partition.fill(initial)
        self.partition.publish()
        self._publish_decays()

    def _publish_decays(self) -> None:
        """Mamba's decays stay fp32 where DeepSpeed keeps every parameter in 16 bits: hand the blocks the masters."""
        if self.config.engine.precision not in ("bf16", "fp16"):
            return
        names = [f"{mixer}.{part}" for mixer in self._mixers for part in DECAYS]
        values = self.partition.gather(names, self.world.device)
        exact_D3H = torch.cat(list(values.values())).view(len(self._mixers), len(DECAYS), -1)
        for module, exact_3H in zip(self._mixers.values(), exact_D3H, strict=True):
            module.exact_3H = exact_3H

    def _initializer(self) -> Initializer:
        model = self._model_config
        return Initializer(
            seed=self.config.seed,
            depth=model.depth,
            width=model.resolved_width,
            init=model.init,
            init_gamma=model.init_gamma,
            init_head=model.init_head,
            init_conditioning=model.init_conditioning,
        )

    def step(self, step: int, batches: Sequence[Batch], votes: Sequence[bool] = ()) -> StepResult:
        """One optimizer step, number `step` (0-based), over this rank's micro-batches.

        `votes`: this rank's answers to questions of the caller's, counted over ranks at no extra cost.
        """
        assert len(batches) == self.split.accumulation
        lr, weight_decay = self._set_rates(step)
        found: list[Losses] = []
        for batch in batches:
            losses = self._losses(step, batch)
            found.append(losses)
            self._engine.backward(losses.loss)
            if len(found) < len(batches):
                self._engine.step()
        grad_norm, applied = self._update()
        if applied:
            self._publish_decays()
        if applied and self.config.optim.ema_decay:
            self.partition.average(self.config.optim.ema_decay)
        averages, bad, counts = self._agree(found, batches, votes, self.plan.lesson(step).scales)
        self.skipped_steps += not applied
        scale = float(self._scaler.cur_scale) if self._scaler is not None else None
        return StepResult(averages, grad_norm, lr, weight_decay, not applied, bad, scale, counts)

    def _set_rates(self, step: int) -> tuple[float, float]:
        lr, weight_decay = self.plan.lr(step), self.plan.decay(step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        return lr, weight_decay

    def _losses(self, step: int, batch: Batch) -> Losses:
        seed, model = self.config.seed, self._model_config
        dropped_B = torch.from_numpy(randomness.label_drop(seed, step, batch.positions_B, model.label_drop))
        labels_B = torch.where(dropped_B, torch.tensor(model.num_classes), batch.labels_B)
        drop_path_DGB = None
        if any(self._rates_D):
            drop_path_DGB = torch.from_numpy(randomness.drop_path(seed, step, batch.positions_B, self._rates_D))
        return self.objective(self._engine, batch.codes_BL, labels_B, drop_path_DGB, self.plan.lesson(step))

    def _update(self) -> tuple[float | None, bool]:
        """Clip and step, unless the gradient is not finite: its norm, and whether the update was made.

        With ZeRO, DeepSpeed decides so on its own, from the norm over all ranks.
        """
        if self.stage == 0:
            weights = [p for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(weights, self.config.optim.clip_grad or math.inf))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                self._engine.micro_steps += 1
                return None, False
            self._engine.step()
            return norm, True
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return (norm if math.isfinite(norm) and norm >= 0 else None), bool(self._engine.was_step_applied())

    def _agree(
        self, found: list[Losses], batches: Sequence[Batch], votes: Sequence[bool], scales: int
    ) -> tuple[Averages, list[int], tuple[int, ...]]:
        """One sum over ranks a step: losses, whether anybody has a bad sample, and the votes."""
        loss_BS = torch.cat([losses.loss_BS for losses in found])
        correct_BS = torch.cat([losses.correct_BS for losses in found])
        indices_B = np.concatenate([batch.indices_B for batch in batches])
        self._last = loss_BS, indices_B
        bad_B = ~loss_BS.isfinite().all(dim=1)
        counted = torch.tensor([int(bad_B.sum()), len(bad_B), *map(int, votes)], device=loss_BS.device)
        sums = self.world.sum(torch.cat([loss_BS.sum(dim=0), correct_BS.sum(dim=0), counted]))
        losses, counts = sums[: -len(counted)], [int(count) for count in sums[-len(counted) :]]
        bad: list[int] = []
        if counts[0] > 0:
            bad_indices = indices_B[bad_B.cpu().numpy()].tolist()
            bad = [int(index) for part in self.world.gather(bad_indices) for index in part]
        return self._averages(losses, counts[1], scales), bad, tuple(counts[2:])

    def worst_samples(self, count: int) -> list[int]:
        """Samples (numbers in the train split) of the last step with the highest losses over all ranks, worst first."""
        assert self._last is not None
        loss_BS, indices_B = self._last
        mine = list(zip(loss_BS.sum(dim=1).tolist(), indices_B.tolist(), strict=True))
        pairs = [pair for part in self.world.gather(mine) for pair in part]
        return [index for _, index in sorted(pairs, key=lambda pair: -pair[0])[:count]]

    def _averages(self, sums_2S: Tensor, images: int, scales: int | None = None) -> Averages:
        """`scales`: how many were learned from; those to come have no averages (NaN)."""
        lengths_S = torch.tensor(self.objective.pyramid.lengths, dtype=torch.float64)
        lengths_S[len(lengths_S) if scales is None else scales :] = 0
        loss_S, correct_S = sums_2S.view(2, -1) / max(images, 1)
        return Averages(
            images=images,
            loss=float(loss_S.sum() / lengths_S.sum()),
            loss_per_scale=(loss_S / lengths_S).tolist(),
            accuracy=float(correct_S.sum() / lengths_S.sum()),
            accuracy_per_scale=(correct_S / lengths_S).tolist(),
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Averages:
        """Means over the valid samples of all ranks' batches; every rank brings equally many batches."""
        self._engine.eval()
        sums = torch.zeros(2 * self.objective.pyramid.num_scales + 1, dtype=torch.float64, device=self.world.device)
        for batch in batches:
            losses = self.objective(self._engine, batch.codes_BL, batch.labels_B)
            valid_B = torch.from_numpy(batch.valid_B).to(self.world.device)
            parts = [losses.loss_BS[valid_B].sum(dim=0), losses.correct_BS[valid_B].sum(dim=0)]
            sums += torch.cat([*parts, valid_B.sum().double().view(1)])
        self._engine.train()
        total = self.world.sum(sums)
        return self._averages(total[:-1], int(total[-1]))

    @contextlib.contextmanager
    def drawing(self) -> Iterator[nn.Module]:
        """The model for `mvar.sampling.sampler`, on all ranks, each with equally many calls of it."""
        self._engine.eval()
        with torch.no_grad(), fused.eager():
            yield self.model
        self._engine.train()

    def progress(self, step: int, validation_loss: float | None = None) -> Progress:
        """What a checkpoint after `step` steps has to say, beyond weights and moments."""
        scaler = None
        if self._scaler is not None:
            scaler = {key: float(value) for key, value in vars(self._scaler).items() if key in _SCALER_STATE}
        return Progress(
            step=step,
            samples=self.plan.samples(step),
            adam_steps=self.partition.adam_steps,
            skipped_steps=self.skipped_steps,
            loss_scaler=scaler,
            stretches=self.plan.stretches,
            validation_loss=validation_loss,
        )

    def restore(self, folder: Path) -> int:
        """Take up weights, moments and loss scale; returns the number of steps done."""
        progress = restore(folder, self.partition, self.world)
        self._publish_decays()
        self.skipped_steps = progress.skipped_steps
        if self._scaler is not None and progress.loss_scaler is not None:
            for key in _SCALER_STATE & progress.loss_scaler.keys():
                kind = type(getattr(self._scaler, key))
                setattr(self._scaler, key, kind(progress.loss_scaler[key]))
        return progress.step


_SCALER_STATE = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}
"""What DeepSpeed's dynamic loss scaler changes as it goes."""


def _is_fp16(config: TrainConfig) -> bool:
    return config.engine.precision == "fp16"


def _check_accelerator(config: TrainConfig) -> None:
    from deepspeed.accelerator import get_accelerator

    precision, accelerator = config.engine.precision, get_accelerator()
    works = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if precision in works and not works[precision]():
        raise ConfigError(
            f"engine.precision {precision}: this machine's {accelerator.device_name()} cannot train in it."
            " Use bf16_autocast or fp32."
        )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for AdamW: parameters that decay, and the rest. Order is the model's."""
    groups: list[dict[str, Any]] = [{"params": [], "decays": True}, {"params": [], "decays": False}]
    for name, parameter in model.named_parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # Sharded parameters look empty.
        groups[0 if decays(name, dimensions) else 1]["params"].append(parameter)
    return groups


def make_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, lr: float, offloaded: dict[str, str]
) -> torch.optim.Optimizer:
    """AdamW as `optim.impl` says; `auto` is torch's fused one, or DeepSpeed's for the CPU where moments are offloaded.

    Raises BackendError where DeepSpeed's extension cannot be compiled, or NVIDIA apex is not installed.
    """
    impl = optim.impl
    if impl == "auto":
        impl = "deepspeed_cpu" if "offload_optimizer" in offloaded else "torch"
    settings: dict[str, Any] = {"lr": lr, "betas": optim.betas, "eps": optim.eps}
    if impl == "torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if impl == "apex":
        return _apex_adam(groups, settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    try:
        if impl == "deepspeed_cpu":
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)  # type: ignore[no-any-return]
        return FusedAdam(groups, adam_w_mode=True, **settings)  # type: ignore[no-any-return]
    except Exception as error:  # Whatever the compiler says.
        raise BackendError(
            f"optim.impl {impl}: DeepSpeed's extension cannot be compiled here ({type(error).__name__}: {error})."
            " Install g++ and ninja (and CUDA for the fused one), or set optim.impl=torch."
        ) from error


def _apex_adam(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise BackendError(
            f"optim.impl apex: NVIDIA apex is not installed here ({error}). Build it with its CUDA extensions"
            " (requirements-gpu.txt), or set optim.impl=torch."
        ) from None
    optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
    return optimizer
