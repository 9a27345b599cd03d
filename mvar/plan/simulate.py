"""How a training scales: every stage and micro-batch on more and more GPUs, and which is the best at each size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mvar.config import ActivationCheckpointing
from mvar.ds_config import find_template, read_template
from mvar.errors import ConfigError
from mvar.plan.memory import memory
from mvar.plan.step_time import StepTime, step_time
from mvar.plan.study import ALIKE, COMFORTABLE, Study
from mvar.plan.traffic import traffic

STAGES = ("zero1", "zero2", "zero3")
RECOMPUTES: tuple[ActivationCheckpointing, ...] = ("off", "selective", "every")
LARGEST_MICRO_BATCH = 256


@dataclass(frozen=True)
class Point:
    """One way to train on so many GPUs."""

    world: int
    template: str
    micro_batch: int
    accumulation: int
    recompute: ActivationCheckpointing
    """The least that fits."""
    time: StepTime

    @property
    def global_batch(self) -> int:
        return self.world * self.micro_batch * self.accumulation

    @property
    def images_s(self) -> float:
        return self.global_batch / self.time.total_s


def sizes_between(words: str) -> list[int]:
    """`8..4096` -> 8, 16, ..., 4096. Raises ConfigError."""
    try:
        first, last = (int(word) for word in words.split(".."))
    except ValueError:
        raise ConfigError(f"--simulate {words}: expected FIRST..LAST, such as 8..4096.") from None
    if not 1 <= first <= last:
        raise ConfigError(f"--simulate {words}: expected FIRST from 1, and LAST not below it.")
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found


def simulate(study: Study, worlds: list[int]) -> list[Point]:
    """Every point that fits. The global batch is the recipe's, and grows where that is less than an image a GPU."""
    return [point for world in worlds for template in STAGES for point in _points(study, world, template)]


def best_of(points: Sequence[Point]) -> dict[int, Point]:
    """By GPUs: the most images a second at the smallest global batch.

    As in a plan, a GPU that holds a few images only is not as busy as the arithmetic takes it to be.
    """
    found: dict[int, Point] = {}
    for world in sorted({point.world for point in points}):
        own = [point for point in points if point.world == world]
        smallest = min(point.global_batch for point in own)
        fair = [point for point in own if point.global_batch == smallest]
        roomy = [point for point in fair if point.micro_batch >= min(COMFORTABLE, smallest // world)] or fair
        fastest = max(point.images_s for point in roomy)
        alike = [point for point in roomy if point.images_s * ALIKE >= fastest]
        found[world] = max(alike, key=lambda point: point.micro_batch)
    return found


def _points(study: Study, world: int, template: str) -> Iterator[Point]:
    cluster = study.assumed.cluster
    gpus = min(cluster.gpus, world)
    here = replace(cluster, nodes=-(-world // gpus), gpus=gpus)
    zero = read_template(find_template(Path("ds_configs") / f"{template}.json"))["zero_optimization"]
    micro_batch = 1
    while micro_batch <= LARGEST_MICRO_BATCH:
        accumulation = max(1, study.split.global_batch // (world * micro_batch))
        if accumulation == 1 and micro_batch > 1 and world * micro_batch > study.split.global_batch:
            return
        for recompute in RECOMPUTES:
            setup = replace(study.setup(zero, recompute), world=world, accumulation=accumulation)
            if memory(study.sizes, setup, micro_batch).peak <= cluster.gpu.usable_bytes:
                images = world * micro_batch * accumulation
                time = step_time(study.sizes, setup, traffic(study.sizes, setup), images, here)
                yield Point(world, template, micro_batch, accumulation, recompute, time)
                break
        micro_batch *= 2
