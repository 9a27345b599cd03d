"""Views to codes on the device, in the arithmetic that the configuration names.

On a CPU each thread encodes pieces of a batch by itself. That is as fast as all threads on each operation, and a
picture's codes do not depend on their number: float32 sums that are split over threads do.

Legend: B views encoded at once, L tokens, H, W pixels, C channels, h, w sides of the latent map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.job import Precision, TokenizeConfig
from mvar.cgroups import cores
from mvar.errors import BackendError
from mvar.images.arrays import from_uint8, to_model_range
from mvar.images.views import Pixels
from mvar.log import Chosen, tell
from mvar.machine.allocator import keep_freed_memory
from mvar.model.kernels.arithmetic import products
from mvar.model.kernels.launch import usable
from mvar.model.kernels.precision import lacking
from mvar.tokenizer.files import load_tokenizer
from mvar.tokenizer.vqvae import VQVAE

PIECE = 2
"""Views that a CPU thread encodes at once: large enough for fast convolutions, small enough to share out evenly."""


class Launched(Protocol):
    """Codes that are on their way."""

    def is_done(self) -> bool: ...

    def collect(self) -> NDArray[np.uint16]:
        """The codes (B, L), when they are done."""
        ...


@dataclass
class BatchEncoder:
    """At most `batch` views at once through the convolutions, in `precision`; the quantizer is float32 always.

    `threads`: of a CPU; default: all cores.
    """

    vqvae: VQVAE
    device: torch.device
    batch: int
    precision: Precision = "fp32"
    compiled: bool = False
    threads: int | None = None
    _features: Callable[[Tensor], Tensor] = field(init=False, repr=False)
    _pool: ThreadPoolExecutor | None = field(init=False, repr=False, default=None)
    _latest: Launched | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        features = half_features(self.vqvae) if self.precision == "bf16" else self.vqvae.features
        self._features = torch.compile(features, dynamic=False) if self.compiled else features
        if self.device.type == "cpu":
            threads = cores() if self.threads is None else self.threads
            self._pool = ThreadPoolExecutor(threads, "mvar-encode", initializer=torch.set_num_threads, initargs=(1,))

    @classmethod
    def load(cls, config: TokenizeConfig) -> BatchEncoder:
        """The tokenizer of the configuration on its device. Raises TokenizerError, BackendError."""
        has_cuda = torch.cuda.is_available()
        if config.device == "cuda" and not has_cuda:
            raise BackendError("device=cuda: this machine has no CUDA device that torch can use. Set device=cpu.")
        device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
        if device.type == "cpu":
            if config.precision == "tf32":
                raise BackendError("precision=tf32: a CPU does not have it. Set precision=fp32, or bf16.")
            if config.precision == "bf16" and (problem := lacking(torch.bfloat16, device)):
                reason = f"{problem}; precision=fp32 is several times faster, and exact"
                tell([Chosen("precision", "bf16", reason, slow=True)])
            keep_freed_memory()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        geometry = None if config.patch_nums is None else {"patch_nums": list(config.patch_nums)}
        vqvae = load_tokenizer(config.tokenizer, geometry)
        layout = _layout(device, config.precision, config.compile)
        torch.nn.utils.convert_conv2d_weight_memory_format(vqvae.to(device), layout)
        return cls(vqvae, device, config.batch, config.precision, config.compile, config.threads)

    def exact(self) -> BatchEncoder:
        """The same tokenizer in plain float32."""
        return BatchEncoder(self.vqvae, self.device, self.batch, threads=self.threads)

    def __call__(self, images_BHWC: Pixels) -> NDArray[np.uint16]:
        """uint8 (B, H, W, 3) -> codes, uint16 (B, L)."""
        return self.launch(images_BHWC).collect()

    def launch(self, images_BHWC: Pixels) -> Launched:
        """Start encoding, behind what was launched before: the caller goes on at once."""
        self._latest = self._launch_on_threads(images_BHWC) if self._pool else self._launch_on_gpu(images_BHWC)
        return self._latest

    def is_idle(self) -> bool:
        """Whether everything that was launched is done."""
        return self._latest is None or self._latest.is_done()

    def in_pieces(self, work: Callable[[slice], Tensor], count: int) -> Tensor:
        """What `work` gives for slices of `count` views, cut and computed as for encoding, in their order."""
        if self._pool is None:
            return torch.cat([work(own) for own in _slices(count, self.batch)])
        return torch.cat(list(self._pool.map(work, _slices(count, PIECE))))

    def _launch_on_threads(self, images_BHWC: Pixels) -> Launched:
        assert self._pool is not None
        pieces = (images_BHWC[own] for own in _slices(len(images_BHWC), PIECE))
        return _OnThreads([self._pool.submit(self._encode, from_uint8(piece), PIECE) for piece in pieces])

    def _launch_on_gpu(self, images_BHWC: Pixels) -> Launched:
        # Bytes travel, from pinned memory: a quarter of what floats would be.
        pinned_BHWC = torch.from_numpy(np.ascontiguousarray(images_BHWC)).pin_memory()
        layout = _layout(self.device, self.precision, self.compiled)
        with deterministic(tf32=False):
            parts = [
                self._encode(
                    to_model_range(bytes_BHWC.to(self.device, non_blocking=True)).contiguous(memory_format=layout),
                    self.batch,
                )
                for bytes_BHWC in pinned_BHWC.split(self.batch)
            ]
        event = torch.cuda.Event()
        event.record()
        return _OnGpu(parts, event)

    @torch.inference_mode()
    def _encode(self, images_BCHW: Tensor, size: int) -> Tensor:
        """Codes of at most `size` views, int64 (B, L)."""
        count = len(images_BCHW)
        if self.compiled and count < size:  # Filled up, so that only one size is compiled.
            filler = images_BCHW.new_zeros(size - count, *images_BCHW.shape[1:])
            images_BCHW = torch.cat([images_BCHW, filler]).contiguous(memory_format=torch.channels_last)
        if self.precision == "tf32":
            with deterministic(tf32=True):
                features_BChw = self._features(images_BCHW)
        else:
            features_BChw = self._features(images_BCHW)
        return self.vqvae.quantizer.encode(features_BChw[:count])


@dataclass(frozen=True)
class _OnThreads:
    pieces: list[Future[Tensor]]

    def is_done(self) -> bool:
        return all(piece.done() for piece in self.pieces)

    def collect(self) -> NDArray[np.uint16]:
        return _as_stored([piece.result() for piece in self.pieces])


@dataclass(frozen=True)
class _OnGpu:
    parts: list[Tensor]
    event: torch.cuda.Event

    def is_done(self) -> bool:
        return bool(self.event.query())

    def collect(self) -> NDArray[np.uint16]:
        return _as_stored(self.parts)


def _layout(device: torch.device, precision: Precision, compiled: bool) -> torch.memory_format:
    """The order of elements that convolutions are faster in; the codes are the same.

    Images a second on an H200, channels last and first, with torch's own group norm, which copies maps that have them
    last: 16 and 33 in fp32, 273 and 199 in tf32, 211 and 239 in bf16. Our group norm copies none.
    """
    last = device.type == "cpu" or precision == "tf32" or compiled
    last = last or (precision == "bf16" and usable(torch.empty(0, device=device)))
    return torch.channels_last if last else torch.contiguous_format


def _slices(count: int, size: int) -> list[slice]:
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def _as_stored(parts: list[Tensor]) -> NDArray[np.uint16]:
    return torch.cat(parts).cpu().numpy().astype(np.uint16)


def half_features(vqvae: VQVAE) -> Callable[[Tensor], Tensor]:
    """`vqvae.features` with the encoder's trunk in bfloat16; the two small convolutions behind it stay in float32.

    Rounding only what they give would already change four codes in a hundred.
    """
    trunk = copy.deepcopy(vqvae.encoder).bfloat16().trunk

    def features(images_BCHW: Tensor) -> Tensor:
        f_BChw: Tensor = vqvae.quant_conv(vqvae.encoder.head(trunk(images_BCHW.bfloat16()).float()))
        return f_BChw

    return features


@contextmanager
def deterministic(*, tf32: bool) -> Iterator[None]:
    """No algorithms picked by a race, and TF32 only where asked for: the same codes every time."""
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32),
        products(torch.device("cuda"), tf32=tf32),
    ):
        yield
