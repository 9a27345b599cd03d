"""The multi-scale residual quantizer: a feature map to a pyramid of codes, and back.

Published as "VAR" (arXiv 2404.02905, Algorithms 1 and 2), which M-VAR (arXiv 2411.10433) takes over. Everything the
transformer's training and sampling need of the tokenizer is here: the codebook and the phi convolutions.

Legend: B images, C latent channels, h = w side of the feature map, k scale, L tokens of all scales, Lk tokens of
scale k, S scales, V words of the codebook, N rows of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.errors import ConfigError, TokenizerError
from mvar.model.kernels.arithmetic import ieee
from mvar.model.kernels.precision import Embedding, no_autocast
from mvar.scales import ScalePyramid

PHI_OF_SCALE: dict[tuple[int, int], tuple[int, ...]] = {
    (10, 4): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    (4, 4): (0, 1, 2, 3),
}
"""(scales, phi convolutions) -> convolution of each scale, as in the published models. Never derived: scales 2 and 7
of ten lie exactly between two ticks, so that rounding decides."""

ROWS_AT_ONCE = 2048
"""Feature vectors compared with the codebook in one matrix product: bounds memory, and keeps the scores in cache."""


def phi_of_scale(num_scales: int, phis: int) -> tuple[int, ...]:
    """Which phi convolution serves each scale.

    The tables of `PHI_OF_SCALE` win. Otherwise scale k of S sits at k/(S-1), the phis sit at evenly spaced ticks from
    1/(3P) to 1-1/(3P) (1/(2P) unless there are P=4), the nearest tick wins and a tie goes to the later one. In exact
    arithmetic this rule gives both tables.
    """
    if (num_scales, phis) in PHI_OF_SCALE:
        return PHI_OF_SCALE[num_scales, phis]
    edge = Fraction(1, (3 if phis == 4 else 2) * phis)
    ticks = [edge + (1 - 2 * edge) * Fraction(i, max(phis - 1, 1)) for i in range(phis)]
    places = [Fraction(k, max(num_scales - 1, 1)) for k in range(num_scales)]
    return tuple(min(range(phis), key=lambda i: (abs(ticks[i] - place), -i)) for place in places)


@dataclass(frozen=True)
class Quantized:
    """What a training step of the tokenizer needs. Losses are means over elements and over the scales."""

    f_hat_BChw: Tensor
    """The quantized map; its gradient goes straight through to the input."""
    codes_BL: Tensor
    codebook_loss: Tensor
    """Moves words and phi towards the features."""
    commitment_loss: Tensor
    """Moves the features towards the words."""
    residuals_k: tuple[Tensor, ...]
    """Per scale the vectors that were quantized, (B*Lk, C), detached: donors for dead words."""


class Phi(nn.Conv2d):
    """The convolution that mends what up-sampling blurs: (1 - ratio) h + ratio conv(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, h_BChw: Tensor) -> Tensor:
        return h_BChw.mul(1 - self.ratio) + super().forward(h_BChw).mul(self.ratio)


class PhiBank(nn.Module):
    """Phi convolutions, each shared by neighbouring scales."""

    def __init__(self, phis: int, channels: int, ratio: float, num_scales: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels, ratio) for _ in range(phis))
        self.of_scale = phi_of_scale(num_scales, phis)

    def forward(self, h_BChw: Tensor, scale: int) -> Tensor:
        mended: Tensor = self.qresi_ls[self.of_scale[scale]](h_BChw)
        return mended


class Quantizer(nn.Module):
    """Codebook and phi convolutions of one pyramid. All arithmetic is IEEE float32, also under autocast and TF32.

    `vocab_size` words of `latent_channels`; `patch_nums`: sides of the token maps, the last is the feature map's side;
    `phis`: phi convolutions; `phi_ratio`: their share of the result. State-dict names and shapes are the published
    ones. `ema_vocab_hit_SV` counts how often each scale uses each word (the trainer keeps it); it may be absent from a
    state dict. Raises ConfigError for an impossible geometry.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(
        self,
        vocab_size: int,
        latent_channels: int,
        patch_nums: Sequence[int],
        phis: int = 4,
        phi_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        if min(vocab_size, latent_channels, phis) < 1 or not 0 <= phi_ratio <= 1:
            raise ConfigError(
                f"quantizer: got vocab_size {vocab_size}, latent_channels {latent_channels}, phis {phis}, phi_ratio"
                f" {phi_ratio}; expected positive counts and a ratio from 0 to 1."
            )
        self.pyramid = ScalePyramid(tuple(patch_nums))
        self.vocab_size = vocab_size
        self.latent_channels = latent_channels
        self.phis = phis
        self.phi_ratio = phi_ratio
        self.embedding = Embedding(vocab_size, latent_channels)
        self.quant_resi = PhiBank(phis, latent_channels, phi_ratio, self.pyramid.num_scales)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(self.pyramid.num_scales, vocab_size))

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return self.pyramid.patch_nums

    @property
    def side(self) -> int:
        """Side of the feature map."""
        return self.pyramid.patch_nums[-1]

    @property
    def geometry(self) -> dict[str, Any]:
        """JSON-able; `Quantizer(**geometry)` rebuilds the same shapes."""
        return {
            "vocab_size": self.vocab_size,
            "latent_channels": self.latent_channels,
            "patch_nums": list(self.patch_nums),
            "phis": self.phis,
            "phi_ratio": self.phi_ratio,
        }

    # ---- codes from features

    @torch.no_grad()
    def encode(self, f_BChw: Tensor) -> Tensor:
        """Feature map (B, C, side, side) -> codes (B, L) int64 of all scales. Raises TokenizerError."""
        return torch.cat(self._residual_steps(self._checked(f_BChw)).codes_k, dim=1)

    def forward(self, f_BChw: Tensor, kept_scales_B: Tensor | None = None) -> Quantized:
        """Quantize for training: codes, losses of every scale's running reconstruction, straight-through gradient.

        `kept_scales_B` (int64, 1 to S): scales that make up each image's `f_hat_BChw`; all by default.
        """
        f_BChw = self._checked(f_BChw)
        with _exact(f_BChw):
            steps = self._residual_steps(f_BChw)
            codebook = torch.stack([F.mse_loss(f_hat, f_BChw.detach()) for f_hat in steps.f_hats_k]).mean()
            commitment = torch.stack([F.mse_loss(f_BChw, f_hat.detach()) for f_hat in steps.f_hats_k]).mean()
            f_hat_BChw = steps.f_hats_k[-1]
            if kept_scales_B is not None:
                places_B = torch.arange(len(f_BChw), device=f_BChw.device)
                f_hat_BChw = torch.stack(steps.f_hats_k)[kept_scales_B - 1, places_B]
            straight_BChw = f_BChw + (f_hat_BChw - f_BChw).detach()
        return Quantized(straight_BChw, torch.cat(steps.codes_k, dim=1), codebook, commitment, steps.residuals_k)

    def nearest(self, rows_NC: Tensor) -> Tensor:
        """The word nearest to each row by squared Euclidean distance: float32 (N, C) -> int64 (N,)."""
        with torch.no_grad(), _exact(rows_NC):
            return self._nearest(rows_NC.float(), self._half_norms_V())

    def shrunk(self, f_BChw: Tensor, scale: int) -> Tensor:
        """Averages over areas of a feature map (B, C, side, side), as many as the token map of `scale` has tokens."""
        side = self.patch_nums[scale]
        return f_BChw if side == self.side else F.interpolate(f_BChw, size=(side, side), mode="area")

    # ---- features from codes

    def start(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """The empty reconstruction (B, C, side, side) that `add_scale` builds on."""
        device = self.embedding.weight.device if device is None else device
        return torch.zeros(batch, self.latent_channels, self.side, self.side, device=device)

    def words(self, codes_BLk: Tensor, scale: int) -> Tensor:
        """Codes of one scale (B, Lk) -> their words (B, Lk, C). Raises TokenizerError."""
        length = self.pyramid.lengths[scale]
        if codes_BLk.dim() != 2 or codes_BLk.shape[1] != length:
            raise TokenizerError(
                f"codes of scale {scale}: got shape {list(codes_BLk.shape)}, expected (batch, {length})."
            )
        vectors_BLC: Tensor = self.embedding(codes_BLk)
        return vectors_BLC

    @torch.no_grad()
    def contribution(self, vectors_BLC: Tensor, scale: int) -> Tensor:
        """What `add_code_vectors` adds for vectors (B, Lk, C) of one scale: (B, C, side, side) float32."""
        with _exact(vectors_BLC):
            return self._mended(vectors_BLC, scale)

    @torch.no_grad()
    def add_scale(self, f_hat_BChw: Tensor, codes_BLk: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add one scale's codes (B, Lk) to the running reconstruction.

        Returns the new reconstruction and what the transformer is fed for the next scale, (B, L of the next, C)
        float32; None after the last scale. `f_hat_BChw` itself is left alone.
        """
        return self.add_code_vectors(f_hat_BChw, self.words(codes_BLk, scale), scale)

    @torch.no_grad()
    def add_code_vectors(self, f_hat_BChw: Tensor, vectors_BLC: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """As `add_scale`, from vectors (B, Lk, C) that need not be words: smoothed sampling mixes words."""
        with _exact(f_hat_BChw):
            f_hat_BChw = f_hat_BChw + self._mended(vectors_BLC, scale)
            if scale + 1 == self.pyramid.num_scales:
                return f_hat_BChw, None
            return f_hat_BChw, _rows_BLC(self.shrunk(f_hat_BChw, scale + 1))

    @torch.no_grad()
    def inputs_from_codes(self, codes_BL: Tensor) -> Tensor:
        """What the transformer is fed when it is taught: codes (B, L) -> (B, L - 1, C) float32.

        The tokens of scales 1.. in order (scale 0 is fed the class alone); exactly what sampling feeds. Codes of the
        last scale are not used.
        """
        inputs = [next_BLkC for _, next_BLkC in self._scales(codes_BL) if next_BLkC is not None]
        if not inputs:
            return self.embedding.weight.new_zeros(codes_BL.shape[0], 0, self.latent_channels)
        return torch.cat(inputs, dim=1)

    @torch.no_grad()
    def latent_from_codes(self, codes_BL: Tensor, scales: int | None = None) -> Tensor:
        """Codes (B, L) -> reconstruction (B, C, side, side), of the first `scales` scales (default all)."""
        f_hats = [f_hat for f_hat, _ in self._scales(codes_BL, scales)]
        return f_hats[-1] if f_hats else self.start(codes_BL.shape[0])

    # ---- inside

    def _checked(self, f_BChw: Tensor) -> Tensor:
        expected = (self.latent_channels, self.side, self.side)
        if f_BChw.dim() != 4 or tuple(f_BChw.shape[1:]) != expected:
            raise TokenizerError(
                f"quantizer: got a feature map of shape {list(f_BChw.shape)}, expected (batch, {expected[0]},"
                f" {expected[1]}, {expected[2]}) for patch_nums {list(self.patch_nums)}."
            )
        return f_BChw.float()

    def _scales(self, codes_BL: Tensor, scales: int | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """`add_scale` over the scales: what it returned for each."""
        if codes_BL.dim() != 2 or codes_BL.shape[1] != self.pyramid.total:
            raise TokenizerError(
                f"codes: got shape {list(codes_BL.shape)}, expected (batch, {self.pyramid.total}) for patch_nums"
                f" {list(self.patch_nums)}."
            )
        f_hat_BChw = self.start(codes_BL.shape[0], codes_BL.device)
        added: list[tuple[Tensor, Tensor | None]] = []
        for scale in range(self.pyramid.num_scales if scales is None else scales):
            f_hat_BChw, next_BLkC = self.add_scale(f_hat_BChw, codes_BL[:, self.pyramid.segment(scale)], scale)
            added.append((f_hat_BChw, next_BLkC))
        return added

    def _residual_steps(self, f_BChw: Tensor) -> _Steps:
        """Take what the coarser scales left, scale by scale (Algorithm 1)."""
        with _exact(f_BChw):
            half_norms_V = self._half_norms_V()
            rest_BChw = f_BChw.detach()
            f_hat_BChw = torch.zeros_like(f_BChw)
            codes_k, f_hats_k, residuals_k = [], [], []
            for scale in range(self.pyramid.num_scales):
                rows_NC = _rows_BLC(self.shrunk(rest_BChw, scale)).reshape(-1, self.latent_channels)
                codes_BLk = self._nearest(rows_NC, half_norms_V).view(f_BChw.shape[0], -1)
                h_BChw = self._mended(self.words(codes_BLk, scale), scale)
                f_hat_BChw = f_hat_BChw + h_BChw
                rest_BChw = rest_BChw - h_BChw.detach()
                codes_k.append(codes_BLk)
                f_hats_k.append(f_hat_BChw)
                residuals_k.append(rows_NC)
        return _Steps(tuple(codes_k), tuple(f_hats_k), tuple(residuals_k))

    def _mended(self, vectors_BLC: Tensor, scale: int) -> Tensor:
        """What one scale adds to the feature map: its words, enlarged by bicubic interpolation, through phi."""
        side = self.patch_nums[scale]
        h_BChw = vectors_BLC.float().transpose(1, 2).reshape(-1, self.latent_channels, side, side)
        if side != self.side:
            h_BChw = F.interpolate(h_BChw, size=(self.side, self.side), mode="bicubic")
        mended_BChw: Tensor = self.quant_resi(h_BChw, scale)
        return mended_BChw

    def _half_norms_V(self) -> Tensor:
        return self.embedding.weight.detach().float().square().sum(dim=1).mul(0.5)

    def _nearest(self, rows_NC: Tensor, half_norms_V: Tensor) -> Tensor:
        """argmin |z - e|^2 = argmin |e|^2/2 - z.e: |z|^2 is the same for every word, so it is left out."""
        vectors_CV = self.embedding.weight.detach().float().t()
        chunks = [
            torch.addmm(half_norms_V, rows, vectors_CV, alpha=-1).argmin(dim=1)
            for rows in torch.split(rows_NC, ROWS_AT_ONCE)
        ]
        return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.int64, device=rows_NC.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Statistics only: a state dict without them is complete.
        state_dict.setdefault(f"{prefix}ema_vocab_hit_SV", self.ema_vocab_hit_SV)
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class _Steps:
    codes_k: tuple[Tensor, ...]
    f_hats_k: tuple[Tensor, ...]
    residuals_k: tuple[Tensor, ...]


@contextmanager
def _exact(tensor: Tensor) -> Iterator[None]:
    """Neither autocast nor TF32: codes are a format, and residual quantization amplifies small errors."""
    with no_autocast(tensor), ieee(tensor.device):
        yield


def _rows_BLC(f_BChw: Tensor) -> Tensor:
    return f_BChw.flatten(2).transpose(1, 2)
