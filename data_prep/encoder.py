"""Views to codes on the device, in the arithmetic that the configuration names.

Legend: B views encoded at once, L tokens, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.job import Precision, TokenizeConfig
from data_prep.views import Pixels
from mvar.errors import BackendError
from mvar.images import from_uint8
from mvar.tokenizer.files import load_tokenizer
from mvar.tokenizer.vqvae import VQVAE


@dataclass
class Encoder:
    """At most `batch` views at once through the convolutions, in `precision`; the quantizer is float32 always."""

    vqvae: VQVAE
    device: torch.device
    batch: int
    precision: Precision = "fp32"
    compiled: bool = False
    _features: Callable[[Tensor], Tensor] = field(init=False, repr=False)
    _launched: torch.cuda.Event | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        # A fixed size: shorter batches are filled up, so that only one is compiled.
        self._features = torch.compile(self.vqvae.features, dynamic=False) if self.compiled else self.vqvae.features

    @classmethod
    def load(cls, config: TokenizeConfig) -> Encoder:
        """The tokenizer of the configuration on its device. Raises TokenizerError, BackendError."""
        has_cuda = torch.cuda.is_available()
        if config.device == "cuda" and not has_cuda:
            raise BackendError("device=cuda: this machine has no CUDA device that torch can use. Set device=cpu.")
        device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        geometry = None if config.patch_nums is None else {"patch_nums": list(config.patch_nums)}
        vqvae = load_tokenizer(config.tokenizer, geometry)
        # channels_last is faster and gives the same codes.
        torch.nn.utils.convert_conv2d_weight_memory_format(vqvae.to(device), torch.channels_last)
        return cls(vqvae, device, config.batch, config.precision, config.compile)

    def exact(self) -> Encoder:
        """The same tokenizer in plain float32."""
        return Encoder(self.vqvae, self.device, self.batch)

    def __call__(self, images_BHWC: Pixels) -> NDArray[np.uint16]:
        """uint8 (B, H, W, 3) -> codes, uint16 (B, L)."""
        return collect(self.launch(images_BHWC))

    def launch(self, images_BHWC: Pixels) -> Tensor:
        """Start encoding: codes int64 (B, L) on the device, which a GPU may still be working on."""
        with deterministic(tf32=False), torch.inference_mode():
            parts = [
                self._encode(self._on_device(from_uint8(images_BHWC[begin : begin + self.batch])))
                for begin in range(0, len(images_BHWC), self.batch)
            ]
            codes_BL = torch.cat(parts)
        if self.device.type == "cuda":
            self._launched = torch.cuda.Event()
            self._launched.record()
        return codes_BL

    def is_idle(self) -> bool:
        """Whether everything that was launched is done."""
        return self._launched is None or self._launched.query()

    def _on_device(self, images_BCHW: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return images_BCHW
        return images_BCHW.pin_memory().to(self.device, non_blocking=True)

    def _encode(self, images_BCHW: Tensor) -> Tensor:
        count = len(images_BCHW)
        if self.compiled and count < self.batch:
            filler = images_BCHW.new_zeros(self.batch - count, *images_BCHW.shape[1:])
            images_BCHW = torch.cat([images_BCHW, filler]).contiguous(memory_format=torch.channels_last)
        with (
            deterministic(tf32=self.precision == "tf32"),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            features_BChw = self._features(images_BCHW)[:count]
        return self.vqvae.quantizer.encode(features_BChw.float())


def collect(codes_BL: Tensor) -> NDArray[np.uint16]:
    """Launched codes, uint16 (B, L), when they are done."""
    return codes_BL.cpu().numpy().astype(np.uint16)


@contextmanager
def deterministic(*, tf32: bool) -> Iterator[None]:
    """No algorithms picked by a race, and TF32 only where asked for: the same codes every time."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
