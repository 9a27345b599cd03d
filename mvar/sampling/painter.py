"""Pixels of batches of images, in their order: on a GPU one batch after the other, on a CPU a batch on each core.

On a CPU each batch is drawn by one thread from end to end. That is as fast as all threads on each operation, and an
image does not depend on their number: float32 sums that are split over threads do.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import psutil
import torch
from torch import Tensor

from mvar.cgroups import cores
from mvar.errors import BackendError
from mvar.images.arrays import Bytes, to_uint8
from mvar.log import log
from mvar.model.kernels.precision import product_dtype
from mvar.model.transformer import MVAR
from mvar.sampling.graph import GraphedDrawing
from mvar.sampling.options import SamplingOptions
from mvar.sampling.pictures import Picture
from mvar.sampling.precision import DTYPES, SamplePrecision
from mvar.sampling.sampler import Forced, Toward
from mvar.tokenizer.vqvae import VQVAE

CPU_BATCH = 8
GPU_BATCH = 256
"""Most images that are drawn together where nothing is asked for: more are not faster."""
PROBE = 8
"""Images that show how much memory one takes."""
SHARE = 0.4
"""Of a GPU's free memory that a batch may take: a CUDA graph keeps its own beside what was used to warm up."""


class Painter:
    """A model, its tokenizer and the options, to draw batches of `batch` images.

    `seed`: the job's. `graphed`: through one CUDA graph. `workers`: threads of a CPU; default: as many as there are
    cores and memory for. `growing`: see GraphedDrawing.
    """

    def __init__(
        self,
        model: MVAR,
        tokenizer: VQVAE,
        options: SamplingOptions,
        precision: SamplePrecision,
        seed: int,
        batch: int,
        *,
        graphed: bool = False,
        workers: int | None = None,
        growing: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._options, self._seed = model, tokenizer, options, seed
        self._precision, self.batch, self._graphed, self._growing = precision, batch, graphed, growing
        self._forced: Callable[[], Forced] | None = None
        self._toward: Toward | None = None
        self.device = model.pos_start.device
        self._workers = workers or _workers(tokenizer, batch)
        self._own = threading.local()

    def variant(self, *, forced: Callable[[], Forced] | None = None, toward: Toward | None = None) -> Painter:
        """The same, with tokens that are given or a class to draw toward; see GraphedDrawing.

        Toward another class it is without a graph: each share would be captured anew.
        """
        other = copy.copy(self)
        other._graphed = self._graphed and toward is None
        other._forced, other._toward, other._own = forced, toward, threading.local()
        return other

    def draw(self, batches: Iterable[Sequence[Picture]]) -> Generator[Bytes, None, None]:
        """Yields uint8 (B, H, W, 3) of each batch, in order; where the painter is `growing`, (B, S, H, W, 3).

        All are drawn full, whatever is asked for, so that rounding is alike in all. Raises MvarError.
        """
        if self.device.type != "cpu":
            yield from map(self._batch, batches)
            return
        pool = ThreadPoolExecutor(self._workers, "mvar-draw", initializer=torch.set_num_threads, initargs=(1,))
        waiting: deque[Future[Bytes]] = deque()
        try:
            for wanted in batches:
                waiting.append(pool.submit(self._batch, wanted))
                if len(waiting) > self._workers:  # One is ready for whoever is done first.
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, wanted: Sequence[Picture]) -> Bytes:
        filled = [*wanted, *[wanted[-1]] * (self.batch - len(wanted))]
        labels_B = torch.tensor([picture.label for picture in filled])
        try:
            images_BCHW = self._drawing()(labels_B, [picture.seed(self._seed) for picture in filled])
        except torch.OutOfMemoryError:
            raise BackendError(
                f"the GPU's memory is too small for {self.batch} images at once. Begin the job in another folder, with "
                "a smaller --batch."
            ) from None
        if not self._growing:
            return to_uint8(images_BCHW[: len(wanted)])
        return np.stack([to_uint8(own) for own in images_BCHW[: len(wanted)]])

    def _drawing(self) -> GraphedDrawing:
        """This thread's own: it has buffers."""
        found: GraphedDrawing | None = getattr(self._own, "drawing", None)
        if found is None:
            found = GraphedDrawing(
                self._model, self._tokenizer, self.batch, self._decode, self._options, graphed=self._graphed,
                growing=self._growing, forced=self._forced, toward=self._toward,
            )  # fmt: skip
            self._own.drawing = found
        return found

    def _decode(self, f_hat_BChw: Tensor) -> Tensor:
        return decoded(self._tokenizer, f_hat_BChw, self._precision)


def decoded(tokenizer: VQVAE, f_hat_BChw: Tensor, precision: SamplePrecision) -> Tensor:
    """Feature maps (B, C, h, w) -> pictures (B, 3, H, W) float32 in [-1, 1], convolved in that precision, or in float32
    on a CPU without its instructions."""
    dtype = product_dtype(DTYPES[precision], f_hat_BChw.device)
    # No memory of casts: a graph would keep those of its capture.
    with torch.autocast(f_hat_BChw.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
        return tokenizer.decode_latent(f_hat_BChw)


def fitting_batch(measure: Callable[[int], int], free_bytes: int, most: int = GPU_BATCH) -> int:
    """Images at once that a GPU has room for: a power of two, at most `most`.

    `measure`: bytes that drawing so many takes at its peak.
    """
    one, several = measure(1), measure(PROBE)
    each = max((several - one) / (PROBE - 1), 1)
    room = (SHARE * free_bytes - (one - each)) / each
    batch = 1
    while batch * 2 <= min(room, most):
        batch *= 2
    return batch


def batch_of_gpu(painter_of: Callable[[int], Painter], device: torch.device) -> int:
    """`fitting_batch` of the GPU's memory as it is now. `painter_of`: a painter of a batch size, without graphs."""

    def measure(count: int) -> int:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in painter_of(count).draw([[Picture(0, number) for number in range(count)]]):
            pass
        return torch.cuda.max_memory_allocated(device) - before

    measure(1)  # Libraries take their workspaces.
    free_bytes, _ = torch.cuda.mem_get_info(device)
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    batch = fitting_batch(measure, free_bytes)
    log.info("batch: %d images at once, because %.1f GiB of the GPU's memory are free", batch, free_bytes / 2**30)
    torch.cuda.empty_cache()
    return batch


def _workers(tokenizer: VQVAE, batch: int) -> int:
    """Threads that draw at once: the decoder's last maps are most of the memory of each."""
    each = batch * 6 * 4 * tokenizer.channels * tokenizer.image_size**2
    return max(1, min(cores(), int(0.7 * psutil.virtual_memory().available / each)))
