"""Decoding ahead: workers turn items into views while the encoder is busy with earlier ones.

This module does not import torch, so that worker processes start fast and stay small.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data_prep.sources import Item, Reader
from data_prep.views import Pixels, ViewPlan


class Order(NamedTuple):
    """One image to render, and how."""

    item: Item
    plan: ViewPlan


@dataclass(frozen=True)
class Renderer:
    """Reads an image and makes its views: uint8 (views, size, size, 3). Raises ImageError."""

    reader: Reader
    seed: int

    def __call__(self, order: Order) -> Pixels:
        return order.plan.render(self.reader(order.item.path), self.seed, order.item.key)


def rendered(
    orders: Iterable[Order], renderer: Renderer, workers: int, kind: Literal["threads", "processes"], ahead: int
) -> Generator[Pixels, None, None]:
    """The views of each order, in order; up to `ahead` are being made or wait. Closing it stops the workers.

    `workers` 0 renders in the caller. Pillow lets go of Python's global lock while it decodes and resizes, so threads
    do for most images; processes also parallelise what is Python.
    """
    if workers == 0:
        yield from map(renderer, orders)
        return
    pool: Executor
    if kind == "threads":
        pool = ThreadPoolExecutor(workers, thread_name_prefix="mvar-decode")
    else:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    waiting: deque[Future[Pixels]] = deque()
    try:
        for order in orders:
            waiting.append(pool.submit(renderer, order))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
