"""Decoding ahead: workers turn items into views while the encoder is busy with earlier ones.

This module does not import torch, so that worker processes start fast and stay small.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from mvar.images.pixels import DamagedImageError
from mvar.images.sources import Item, Reader
from mvar.images.views import Pixels, ViewPlan

if TYPE_CHECKING:
    from data_prep.job import ShardPlan  # Imports torch.


class Order(NamedTuple):
    """One image of a shard to render, and how."""

    shard: ShardPlan
    item: Item
    plan: ViewPlan


class Rendered(NamedTuple):
    """An image's views, uint8 (views, size, size, 3), or why it has none."""

    order: Order
    views: Pixels | DamagedImageError


@dataclass(frozen=True)
class Renderer:
    """Reads an image and makes its views, or returns its damage. Raises ImageError when it cannot be read."""

    reader: Reader
    seed: int

    def __call__(self, item: Item, plan: ViewPlan) -> Pixels | DamagedImageError:
        try:
            return plan.render(self.reader(item.path, item.bytes), self.seed, item.key)
        except DamagedImageError as error:
            return error


def rendered(
    orders: Iterable[Order], renderer: Renderer, workers: int, kind: Literal["threads", "processes"], ahead: int
) -> Generator[Rendered, None, None]:
    """The views of each order, in order; up to `ahead` are being made or wait. Closing it stops the workers.

    `workers` 0 renders in the caller. Pillow lets go of Python's global lock while it decodes and resizes, so threads
    do for most images; processes also parallelise what is Python.
    """
    if workers == 0:
        for order in orders:
            yield Rendered(order, renderer(order.item, order.plan))
        return
    pool: Executor
    if kind == "threads":
        pool = ThreadPoolExecutor(workers, thread_name_prefix="mvar-decode")
    else:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    waiting: deque[tuple[Order, Future[Pixels | DamagedImageError]]] = deque()

    def oldest() -> Rendered:
        order, future = waiting.popleft()
        return Rendered(order, future.result())

    try:
        for order in orders:
            waiting.append((order, pool.submit(renderer, order.item, order.plan)))
            if len(waiting) > ahead:
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def groups(images: Iterator[Rendered], size: int) -> Iterator[list[Rendered]]:
    """Consecutive images in lists of `size`; the last may be shorter."""
    group: list[Rendered] = []
    for image in images:
        group.append(image)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
