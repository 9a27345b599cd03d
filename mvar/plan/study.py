"""One training on one cluster, thought through: the recipe as it stands, and every template that ships."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mvar.config import ActivationCheckpointing, TrainConfig
from mvar.data.store import CodeStore
from mvar.ds_config import BatchSplit, find_template, read_template
from mvar.errors import ConfigError, StoreError
from mvar.plan.flops import best_interval_s, flops, time_lost
from mvar.plan.memory import Kernels, Memory, Setup, checkpoint_bytes, largest_micro_batch, memory
from mvar.plan.sizes import IMAGENET_CLASSES, IMAGENET_IMAGES, Sizes
from mvar.plan.step_time import Cluster, StepTime, step_time
from mvar.plan.traffic import Traffic, traffic
from mvar.schedule import Plan

TEMPLATES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero_infinity")
"""Shipped templates, the fastest first."""
COMFORTABLE = 4
"""Images at once from which a GPU is busy; fewer are taken only where nothing else fits."""


ALIKE = 1.01
"""Steps that differ by less are alike: the option with less memory is taken."""


@dataclass(frozen=True)
class Assumptions:
    """What the plan is told about the cluster."""

    cluster: Cluster
    mtbf_s: float
    disk_bytes_s: float
    price_gpu_hour: float | None = None
    """In any currency."""
    mfu_of: str = "assumed"
    """Where the share of the peak comes from."""

    @property
    def world(self) -> int:
        return self.cluster.world


@dataclass(frozen=True)
class Option:
    """One template, with or without recomputation, and the largest micro-batch that fits."""

    template: str
    recompute: ActivationCheckpointing
    micro_batch: int | None
    """None: nothing fits."""
    memory: Memory
    """With that micro-batch, or with one image."""
    traffic: Traffic
    time: StepTime


@dataclass(frozen=True)
class Study:
    """A plan. All bytes are those of the rank that needs most."""

    config: TrainConfig
    assumed: Assumptions
    sizes: Sizes
    images: int
    measured_store: bool
    """Whether the number of images comes from a store; else it is ImageNet's."""
    split: BatchSplit
    adjusted: bool
    """The recipe's micro-batch does not divide a rank's share; the nearest smaller one that does was taken."""

    @classmethod
    def of(cls, config: TrainConfig, assumed: Assumptions) -> Study:
        """Raises ConfigError for a batch that cannot be divided and for a template that does not exist."""
        images, classes = _data(config)
        model = config.model.model_copy(update={"num_classes": config.model.num_classes or classes or IMAGENET_CLASSES})
        split, adjusted = _split(config, assumed.world)
        study = cls(config, assumed, Sizes.of(model), images or IMAGENET_IMAGES, images is not None, split, adjusted)
        study.recipe  # noqa: B018 - whatever is wrong with the template is found here
        return study

    def setup(self, zero: dict[str, Any], recompute: ActivationCheckpointing) -> Setup:
        model, precision, stage = self.sizes.model, self.config.engine.precision, int(zero["stage"])
        if stage == 0 and precision in ("bf16", "fp16"):
            raise ConfigError(
                f"engine.precision {precision} with ZeRO stage 0: DeepSpeed has no sound fp32 master weights there."
                " Use ds_configs/zero1.json or engine.precision=bf16_autocast."
            )
        by_torch = model.attention_backend == "sdpa" or model.mamba_backend == "torch" or precision == "fp32"
        kernels: Kernels = "gpu_torch" if by_torch else "gpu"
        ema = self.config.optim.ema_decay > 0
        return Setup(stage, precision, self.assumed.world, zero, ema, recompute, kernels, self.split.accumulation)

    @cached_property
    def template(self) -> Path:
        return find_template(self.config.engine.ds_config)

    @cached_property
    def recipe_setup(self) -> Setup:
        zero = read_template(self.template)["zero_optimization"]
        return self.setup(zero, self.config.engine.activation_checkpointing)

    @cached_property
    def recipe(self) -> Memory:
        """The recipe as it stands."""
        return memory(self.sizes, self.recipe_setup, self.split.micro_batch)

    @cached_property
    def options(self) -> list[Option]:
        """Every shipped template that works in the recipe's precision, without and with recomputation."""
        found = []
        for name in TEMPLATES:
            zero = read_template(find_template(Path("ds_configs") / f"{name}.json"))["zero_optimization"]
            if zero["stage"] == 0 and self.config.engine.precision in ("bf16", "fp16"):
                continue
            recomputes: tuple[ActivationCheckpointing, ...] = ("off", "selective", "every")
            found += [self._option(name, zero, recompute) for recompute in recomputes]
        return found

    def _option(self, name: str, zero: dict[str, Any], recompute: ActivationCheckpointing) -> Option:
        setup, share = self.setup(zero, recompute), self.split.global_batch // self.split.ranks
        best = largest_micro_batch(self.sizes, setup, share, self.assumed.cluster.gpu.usable_bytes)
        setup = replace(setup, accumulation=share // (best or 1))
        sent = traffic(self.sizes, setup)
        time = step_time(self.sizes, setup, sent, self.split.global_batch, self.assumed.cluster)
        return Option(name, recompute, best, memory(self.sizes, setup, best or 1), sent, time)

    @cached_property
    def best(self) -> Option | None:
        """The fastest that fits. A GPU that holds a few images only would not be as busy as the plan takes it to be."""
        fitting = [option for option in self.options if option.micro_batch]
        share = self.split.global_batch // self.split.ranks
        roomy = [option for option in fitting if (option.micro_batch or 0) >= min(COMFORTABLE, share)] or fitting
        if not roomy:
            return None
        shortest_s = min(option.time.total_s for option in roomy)
        alike = [option for option in roomy if option.time.total_s <= ALIKE * shortest_s]
        return min(alike, key=lambda option: option.memory.peak)

    @cached_property
    def schedule(self) -> Plan:
        return Plan.of(self.config, self.images)

    @cached_property
    def time(self) -> StepTime:
        """Of the recipe as it stands."""
        setup = self.recipe_setup
        sent = traffic(self.sizes, setup)
        return step_time(self.sizes, setup, sent, self.split.global_batch, self.assumed.cluster)

    @property
    def checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self.sizes, ema=self.config.optim.ema_decay > 0)

    @property
    def write_s(self) -> float:
        return self.checkpoint_bytes / self.assumed.disk_bytes_s

    @property
    def interval_s(self) -> float:
        return best_interval_s(self.write_s, self.assumed.mtbf_s)

    def figures(self) -> dict[str, Any]:
        """Every number, for machines. Bytes, seconds, operations."""
        work, plan, gpu, time = flops(self.sizes), self.schedule, self.assumed.cluster.gpu, self.time
        seen = plan.samples(plan.last_step)
        days = time.total_s * plan.last_step / 86400
        sent, best = traffic(self.sizes, self.recipe_setup), self.best
        return {
            "parameters": self.sizes.parameters,
            "tokens_per_image": self.sizes.tokens,
            "cluster": asdict(self.assumed.cluster) | {"world": self.assumed.world, "usable_bytes": gpu.usable_bytes},
            "assumed": {name: value for name, value in asdict(self.assumed).items() if name != "cluster"},
            "images": self.images,
            "images_from_store": self.measured_store,
            "recipe": {
                "ds_config": str(self.config.engine.ds_config),
                "precision": self.config.engine.precision,
                "activation_checkpointing": self.config.engine.activation_checkpointing,
                "global_batch": self.split.global_batch,
                "micro_batch": self.split.micro_batch,
                "accumulation": self.split.accumulation,
                "bytes": self.recipe.categories(),
                "host_bytes": self.recipe.state.host,
                "disk_bytes": self.recipe.state.disk,
                "peak_bytes": self.recipe.peak,
                "fits": self.recipe.peak <= gpu.usable_bytes,
            },
            "options": [
                {
                    "ds_config": option.template,
                    "activation_checkpointing": option.recompute,
                    "largest_micro_batch": option.micro_batch,
                    "bytes": option.memory.categories(),
                    "peak_bytes": option.memory.peak,
                    "host_bytes": option.memory.state.host,
                    "disk_bytes": option.memory.state.disk,
                    "handed_over_bytes": option.traffic.handed_over,
                    "on_the_wire_bytes": option.traffic.on_the_wire,
                    **self._timed(option.time),
                }
                for option in self.options
            ],
            "best": best
            and {
                "engine.ds_config": f"ds_configs/{best.template}.json",
                "engine.activation_checkpointing": best.recompute,
                "engine.micro_batch": best.micro_batch,
            },
            "traffic": {
                "all_reduce": sent.all_reduce,
                "reduce_scatter": sent.reduce_scatter,
                "all_gather": sent.all_gather,
                "handed_over": sent.handed_over,
                "on_the_wire": sent.on_the_wire,
            },
            "flops": asdict(work)
            | {
                "forward_per_image": work.forward,
                "training_per_image": work.training,
                "training_per_token": work.training / self.sizes.tokens,
            },
            "time": {
                "steps": plan.last_step,
                "images_seen": seen,
                **self._timed(time),
                "gpu_days": days * self.assumed.world,
                "days": days,
            },
            "checkpoint": {
                "bytes": self.checkpoint_bytes,
                "write_s": self.write_s,
                "best_interval_s": self.interval_s,
                "best_interval_steps": max(1, round(self.interval_s / time.total_s)),
                "time_lost": time_lost(self.interval_s, self.write_s, self.assumed.mtbf_s),
            },
        }

    def _timed(self, time: StepTime) -> dict[str, Any]:
        gpu_s = time.total_s * self.assumed.world / self.split.global_batch
        price = self.assumed.price_gpu_hour
        return {
            "step_s": time.total_s,
            **asdict(time),
            "efficiency": time.efficiency,
            "limit": time.limit,
            "gpu_seconds_per_image": gpu_s,
            "cost_per_million_images": None if price is None else price * gpu_s / 3600 * 1e6,
        }


def _data(config: TrainConfig) -> tuple[int | None, int | None]:
    """Training images and classes of the store; None and None without one."""
    if not config.data.store or not Path(config.data.store).is_dir():
        return None, None
    try:
        store = CodeStore.open(config.data.store)
    except StoreError as error:
        raise ConfigError(f"{error} (Or leave data.store out: the plan then takes ImageNet's numbers.)") from None
    return len(store.split("train")), len(store.manifest.classes)


def _split(config: TrainConfig, world: int) -> tuple[BatchSplit, bool]:
    whole = BatchSplit.of(config.global_batch, world, None)
    share, wanted = whole.micro_batch, config.engine.micro_batch or whole.micro_batch
    micro = max(size for size in range(1, share + 1) if share % size == 0 and size <= wanted)
    return BatchSplit.of(config.global_batch, world, micro), micro != wanted
