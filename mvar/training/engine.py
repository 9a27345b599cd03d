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
from mvar.config import ModelConfig, TrainConfig
from mvar.data.stream import Batch
from mvar.ds_config import BatchSplit
from mvar.errors import ConfigError
from mvar.machine.allocator import keep_freed_memory
from mvar.model.backends import chosen_backends
from mvar.model.init import Initializer
from mvar.model.kernels import fused
from mvar.model.kernels.arithmetic import Arithmetic
from mvar.model.mamba2 import DECAYS, Mamba2
from mvar.model.transformer import MVAR, drop_path_rates
from mvar.run.loop import Votes
from mvar.run.world import Later, World, on_device
from mvar.schedule import Plan
from mvar.training.objective import Losses, ModelCall, Objective
from mvar.training.optimizer import make_optimizer, parameter_groups
from mvar.training.pace import DeviceTimer
from mvar.training.zero_gradients import shorten

NO_VOTES = Votes()


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
    votes: Votes
    """Of all ranks together."""
    forward_s: list[float]
    """How long each rank's forward passes took, by rank: under ZeRO 0 to 2 no rank waits for another in them."""


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device may still be busy with. `Engine.result` tells how it went."""

    lr: float
    weight_decay: float
    applied: bool
    loss_scale: float | None
    scales: int
    """How many were learned from."""
    loss_BS: Tensor
    """This rank's losses, on its device."""
    indices_B: NDArray[np.int64]
    """Its samples."""
    numbers: Later
    """Sums over ranks: losses and right words of each scale, bad samples, samples, votes, seconds of forward passes (a
    place for each rank); then the gradient's norm."""


def build_model(config: TrainConfig, model: ModelConfig) -> MVAR:
    """Whatever values its parameters have are replaced before the first step."""
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
        self.chosen = chosen_backends(model, arithmetic, config.engine.compile)
        """How this run computes."""
        compiling = fused.choose(config.engine.compile, world.device, model.depth, model.resolved_width)
        fused.switch(compiling.way == "on")
        self._engine, client = self._initialize(tree)
        self._optimizer = client
        self.partition = Partition(self._engine, client, ema=config.optim.ema_decay > 0)
        shorten(self._engine.optimizer)
        self._scaler: Any = getattr(self._engine.optimizer, "loss_scaler", None) if _is_fp16(config) else None
        modules: Any = self._engine.module.named_modules()
        self._mixers = {name: module for name, module in modules if isinstance(module, Mamba2)}
        self._rates_D = drop_path_rates(model.depth, model.resolved_drop_path)
        self._last: tuple[Tensor, NDArray[np.int64]] | None = None
        """Losses and samples of this rank's step that was told of last."""
        self.skipped_steps = 0
        self._has_average = config.optim.ema_decay > 0
        self._ema_updates: int | None = 0
        """None: an average from before it warmed up."""

    def _initialize(self, tree: ds_config.Tree) -> tuple[Any, torch.optim.Optimizer]:
        import deepspeed

        devices = dict(ds_config.offloads(tree))
        if self.world.device.type == "cpu" and not devices:  # Where weights are offloaded, memory is what is short.
            keep_freed_memory()
        with deepspeed.zero.Init(config_dict_or_path=tree) if self.stage == 3 else torch.device("meta"):
            model = build_model(self.config, self._model_config)
        if self.stage != 3:
            model.to_empty(device="cpu")
        client = make_optimizer(parameter_groups(model), self.config.optim, self.plan.peak_lr, devices)
        engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=tree)
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
        values = values or Initializer(self.config.seed, self._model_config).value
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

    def step(self, step: int, batches: Sequence[Batch], votes: Votes = NO_VOTES) -> StepResult:
        """One optimizer step, number `step` (0-based), and how it went: `launch`, then `result`."""
        return self.result(self.launch(step, batches, votes))

    def launch(self, step: int, batches: Sequence[Batch], votes: Votes = NO_VOTES) -> LaunchedStep:
        """One optimizer step, number `step` (0-based), over this rank's micro-batches, without waiting for its numbers.

        `votes`: this rank's, counted over ranks at no extra cost.

        One read of the device remains, in the middle of the step: DeepSpeed (stage 0: `_update`) has to know whether
        the gradient is finite before it updates. All else is read by `result`, while the next step is under way.
        """
        assert len(batches) == self.split.accumulation
        lr, weight_decay = self._set_rates(step)
        found: list[Losses] = []
        forward = DeviceTimer(self.world.device)
        for batch in batches:
            with forward:
                losses = self._losses(step, batch)
            found.append(losses)
            self._engine.backward(losses.loss)
            if len(found) < len(batches):
                self._engine.step()
        self.partition.release_held()
        grad_norm, applied = self._update()
        if applied:
            self._publish_decays()
        if applied and self._has_average:
            self._average()
        self.skipped_steps += not applied
        loss_BS = torch.cat([losses.loss_BS for losses in found])
        return LaunchedStep(
            lr,
            weight_decay,
            applied,
            loss_scale=float(self._scaler.cur_scale) if self._scaler is not None else None,
            scales=self.plan.curriculum_at(step).scales,
            loss_BS=loss_BS,
            indices_B=np.concatenate([batch.indices_B for batch in batches]),
            numbers=self._sum(
                loss_BS, torch.cat([losses.correct_BS for losses in found]), votes, forward.seconds(), grad_norm
            ),
        )

    def _average(self) -> None:
        """Move the average of the weights, which is young at first: it would remember where it began for 1/(1 - decay)
        steps."""
        decay = self.config.optim.ema_decay
        if self._ema_updates is not None:
            if self.config.optim.ema_warmup:
                decay = min(decay, (1 + self._ema_updates) / (10 + self._ema_updates))
            self._ema_updates += 1
        self.partition.average(decay)

    def _set_rates(self, step: int) -> tuple[float, float]:
        lr, weight_decay = self.plan.lr(step), self.plan.decay(step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        return lr, weight_decay

    def _losses(self, step: int, batch: Batch, through: ModelCall | None = None) -> Losses:
        seed, model = self.config.seed, self._model_config
        dropped_B = torch.from_numpy(randomness.label_drop(seed, step, batch.positions_B, model.label_drop))
        labels_B = torch.where(dropped_B, torch.tensor(model.num_classes), batch.labels_B)
        drop_path_DGB = None
        if any(self._rates_D):
            drop_path_DGB = torch.from_numpy(randomness.drop_path(seed, step, batch.positions_B, self._rates_D))
        curriculum = self.plan.curriculum_at(step)
        return self.objective(through or self._engine, batch.codes_BL, labels_B, drop_path_DGB, curriculum)

    def _update(self) -> tuple[Tensor | float, bool]:
        """Clip and step, unless the gradient is not finite: its norm, and whether the update was made.

        With ZeRO, DeepSpeed decides so on its own, from the norm over all ranks, which it leaves on the device.
        """
        if self.stage == 0:
            weights = [p for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(weights, self.config.optim.clip_grad or math.inf))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                self._engine.micro_steps += 1
                return norm, False
            self._engine.step()
            return norm, True
        self._engine.step()
        return self._engine.get_global_grad_norm(), bool(self._engine.was_step_applied())

    def _sum(
        self, loss_BS: Tensor, correct_BS: Tensor, votes: Votes, forward_s: float, grad_norm: Tensor | float
    ) -> Later:
        """The step's one sum over ranks, not waited for."""
        bad = (~loss_BS.isfinite().all(dim=1)).sum(dtype=loss_BS.dtype).view(1)
        own_R = [forward_s if rank == self.world.rank else 0.0 for rank in range(self.world.size)]
        counted = on_device(torch.tensor([len(loss_BS), *votes.numbers(), *own_R], dtype=loss_BS.dtype), loss_BS.device)
        if not isinstance(grad_norm, Tensor):
            grad_norm = torch.full((1,), grad_norm, device=loss_BS.device)
        sums = torch.cat([loss_BS.sum(dim=0), correct_BS.sum(dim=0), bad, counted])
        return self.world.sum_later(sums, also=grad_norm.detach().view(1))

    def result(self, launched: LaunchedStep) -> StepResult:
        """How a step went, once the device is done with it. All ranks, for every step, in the order of steps."""
        numbers, scales = launched.numbers.get(), self.objective.pyramid.num_scales
        self._last = launched.loss_BS, launched.indices_B
        own_R = numbers[-1 - self.world.size : -1].tolist()
        bad, images, *votes = (int(count) for count in numbers[2 * scales : -1 - self.world.size])
        norm = float(numbers[-1])
        bad_samples: list[int] = []
        if bad:
            bad_B = ~launched.loss_BS.isfinite().all(dim=1)
            parts = self.world.gather(launched.indices_B[bad_B.cpu().numpy()].tolist())
            bad_samples = [int(index) for part in parts for index in part]
        return StepResult(
            averages=self._averages(numbers[: 2 * scales], images, launched.scales),
            grad_norm=norm if math.isfinite(norm) and norm >= 0 else None,
            lr=launched.lr,
            weight_decay=launched.weight_decay,
            skipped=not launched.applied,
            bad_samples=bad_samples,
            loss_scale=launched.loss_scale,
            votes=Votes(*votes),
            forward_s=own_R,
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """What this rank computes with, by name: whole under ZeRO 0 to 2."""
        return dict(self._engine.module.named_parameters())

    def differentiate(self, step: int, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of one micro-batch of step `step`, this rank's own, without a trace in the training.

        Gradients are handed out instead of added up, so nothing that ZeRO does with them begins; they take room for all
        parameters in their type. Under ZeRO 3 ranks need each other all the same: all ranks together.
        """
        from deepspeed.runtime.torch_autocast import autocast_if_enabled

        module = self._engine.module
        with autocast_if_enabled(self._engine):
            loss = self._losses(step, batch, module).loss
        scale = float(self._scaler.cur_scale) if self._scaler is not None else 1.0
        gradients = torch.autograd.grad(scale * loss, list(module.parameters()), materialize_grads=True)
        if self.stage == 3:
            self.partition.release()
        return loss.detach(), list(gradients)

    def worst_samples(self, count: int) -> list[int]:
        """Samples (numbers in the train split) with the highest losses over all ranks, worst first, of the step that
        `result` told of last."""
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
    def evaluate(self, batches: Iterable[Batch], between: Callable[[], object] = lambda: None) -> Averages:
        """Means over the valid samples of all ranks' batches; every rank brings equally many batches.

        `between`: called before each batch; what it raises, on all ranks alike, ends it.
        """
        sums = torch.zeros(2 * self.objective.pyramid.num_scales + 1, dtype=torch.float64, device=self.world.device)
        with self._evaluating():
            for batch in batches:
                between()
                losses = self.objective(self._engine, batch.codes_BL, batch.labels_B)
                valid_B = torch.from_numpy(batch.valid_B).to(self.world.device)
                parts = [losses.loss_BS[valid_B].sum(dim=0), losses.correct_BS[valid_B].sum(dim=0)]
                sums += torch.cat([*parts, valid_B.sum().double().view(1)])
        total = self.world.sum(sums)
        return self._averages(total[:-1], int(total[-1]))

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[nn.Module]:
        """The model for `mvar.sampling.sampler`, on all ranks, each with equally many calls of it."""
        with self._evaluating(), torch.no_grad(), fused.eager():
            yield self.model

    def progress(self, step: int) -> Progress:
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
            stretches=self.plan.phases,
            ema_updates=self._ema_updates if self._has_average else None,
        )

    def restore(self, folder: Path) -> Progress:
        """Take up weights, moments and loss scale; tells where that was."""
        record = restore(folder, self.partition, self.world)
        progress = record.progress
        self._ema_updates = progress.ema_updates if EMA in record.kinds else 0
        self._publish_decays()
        self.skipped_steps = progress.skipped_steps
        if self._scaler is not None and progress.loss_scaler is not None:
            for key in _SCALER_STATE & progress.loss_scaler.keys():
                kind = type(getattr(self._scaler, key))
                setattr(self._scaler, key, kind(progress.loss_scaler[key]))
        return progress


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
