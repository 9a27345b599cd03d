"""The multi-scale VQ-VAE: convolutional encoder and decoder around the residual quantizer.

The geometry, the parameter names and their shapes are those of the published tokenizer of VAR (arXiv 2404.02905),
whose encoder and decoder follow the VQGAN (arXiv 2012.09841).

Legend: B images, C channels, H = W side of a picture or map in pixels, h = w side of the latent map, L tokens of all
scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.errors import ConfigError, TokenizerError
from mvar.model.kernels.arithmetic import ieee
from mvar.model.kernels.group_norm import group_norm
from mvar.pretrained import Pretrained
from mvar.scales import PATCH_NUMS_256
from mvar.tokenizer.quantizer import Quantizer

NORM_GROUPS = 32


class VQVAE(nn.Module, Pretrained):
    """Pictures to codes and back.

    `channels`: width of the first level; `channel_mult`: each level's width as a multiple of it, one halving of the
    side between two levels, attention on the last; `res_blocks`: residual blocks of an encoder level (a decoder level
    has one more); the other arguments are the quantizer's. The defaults are the published 256 px tokenizer. Pictures
    have a side of `image_size` = `downsampling` x the last of `patch_nums`. Raises ConfigError for an impossible
    geometry.
    """

    def __init__(
        self,
        channels: int = 160,
        latent_channels: int = 32,
        vocab_size: int = 4096,
        patch_nums: Sequence[int] = PATCH_NUMS_256,
        *,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        phis: int = 4,
        phi_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        if channels < 1 or res_blocks < 1 or not channel_mult or min(channel_mult) < 1:
            raise ConfigError(
                f"tokenizer: got channels {channels}, res_blocks {res_blocks}, channel_mult {list(channel_mult)};"
                " expected positive numbers and at least one level."
            )
        self.channels = channels
        self.channel_mult = tuple(channel_mult)
        self.res_blocks = res_blocks
        widths = [channels * mult for mult in channel_mult]
        self.encoder = Encoder(widths, channels, latent_channels, res_blocks)
        self.decoder = Decoder(widths, channels, latent_channels, res_blocks)
        self.quantize = Quantizer(vocab_size, latent_channels, patch_nums, phis, phi_ratio)
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer; in state dicts it has its published name, `quantize`."""
        return self.quantize

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return self.quantize.patch_nums

    @property
    def vocab_size(self) -> int:
        return self.quantize.vocab_size

    @property
    def latent_channels(self) -> int:
        return self.quantize.latent_channels

    @property
    def downsampling(self) -> int:
        """Pixels of a picture's side for each element of the latent map's side."""
        return 1 << (len(self.channel_mult) - 1)

    @property
    def image_size(self) -> int:
        """Side of a picture, in pixels."""
        return self.downsampling * self.patch_nums[-1]

    @property
    def geometry(self) -> dict[str, Any]:
        """JSON-able; `VQVAE(**geometry)` rebuilds the same shapes."""
        own = {"channels": self.channels, "channel_mult": list(self.channel_mult), "res_blocks": self.res_blocks}
        return own | self.quantize.geometry

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> the quantizer's input (B, C, h, w). Raises TokenizerError."""
        size = self.image_size
        if images_BCHW.dim() != 4 or tuple(images_BCHW.shape[1:]) != (3, size, size):
            raise TokenizerError(
                f"images: got shape {list(images_BCHW.shape)}, expected (batch, 3, {size}, {size}): this tokenizer"
                f" takes {size} px pictures."
            )
        f_BChw: Tensor = self.quant_conv(self.encoder(images_BCHW))
        return f_BChw

    def pixels(self, f_hat_BChw: Tensor) -> Tensor:
        """Latent map (B, C, h, w) -> pictures (B, 3, H, W), not clamped: what a loss compares."""
        images_BCHW: Tensor = self.decoder(self.post_quant_conv(f_hat_BChw))
        return images_BCHW

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [-1, 1] -> codes (B, L) int64, scales concatenated, each in raster order.

        Under autocast only the convolutions are rounded; everything else is IEEE float32, also on GPUs. Raises
        TokenizerError for another shape.
        """
        with ieee(images_BCHW.device):
            return self.quantize.encode(self.features(images_BCHW))

    @torch.no_grad()
    def decode(self, codes_BL: Tensor) -> Tensor:
        """Codes (B, L) -> pictures (B, 3, H, W) float32, clamped to [-1, 1]. Raises TokenizerError."""
        return self.decode_latent(self.quantize.latent_from_codes(codes_BL))

    @torch.no_grad()
    def decode_latent(self, f_hat_BChw: Tensor) -> Tensor:
        """Latent map (B, C, h, w) -> pictures (B, 3, H, W) float32, clamped to [-1, 1]."""
        return self.pixels(f_hat_BChw).float().clamp(-1, 1)

    def inputs_from_codes(self, codes_BL: Tensor) -> Tensor:
        """What the transformer is fed: codes (B, L) -> (B, L - 1, latent) float32."""
        return self.quantize.inputs_from_codes(codes_BL)


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> (B, latent, h, w)."""

    def __init__(self, widths: Sequence[int], channels: int, latent_channels: int, res_blocks: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        levels: list[Level] = []
        width = channels
        for level, level_width in enumerate(widths):
            levels.append(Level(width, level_width, res_blocks, attention=level == last))
            width = level_width
            if level != last:
                levels[-1].downsample = Downsample(width)
        self.down = nn.ModuleList(levels)
        self.mid = Middle(width)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.trunk(x_BCHW))

    def trunk(self, x_BCHW: Tensor) -> Tensor:
        """Nearly all of the work: (B, 3, H, W) -> (B, width, h, w)."""
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        mixed_BChw: Tensor = self.mid(x_BCHW)
        return mixed_BChw

    def head(self, x_BChw: Tensor) -> Tensor:
        out_BChw: Tensor = self.conv_out(group_norm(self.norm_out, x_BChw, silu=True))
        return out_BChw


class Decoder(nn.Module):
    """(B, latent, h, w) -> pictures (B, 3, H, W). `up` is numbered like the encoder's levels and run backwards."""

    def __init__(self, widths: Sequence[int], channels: int, latent_channels: int, res_blocks: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(latent_channels, widths[last], 3, padding=1)
        self.mid = Middle(widths[last])
        levels: list[Level] = []
        width = widths[last]
        for level in range(last, -1, -1):
            levels.append(Level(width, widths[level], res_blocks + 1, attention=level == last))
            width = widths[level]
            if level != 0:
                levels[-1].upsample = Upsample(width)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        x_BChw = self.mid(self.conv_in(x_BChw))
        for level in reversed(self.up):
            x_BChw = level(x_BChw)
        images_BCHW: Tensor = self.conv_out(group_norm(self.norm_out, x_BChw, silu=True))
        return images_BCHW


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the level has it, then the change of side."""

    downsample: Downsample | None
    upsample: Upsample | None

    def __init__(self, width_in: int, width: int, blocks: int, *, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width_in if i == 0 else width, width) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(width) for _ in range(blocks if attention else 0))
        self.downsample = None
        self.upsample = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[i](x_BCHW)
        for resize in (self.downsample, self.upsample):
            if resize is not None:
                x_BCHW = resize(x_BCHW)
        return x_BCHW


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = PixelAttention(width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.block_2(self.attn_1(self.block_1(x_BCHW)))
        return out_BCHW


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW: Tensor = self.conv1(group_norm(self.norm1, x_BCHW, silu=True))
        h_BCHW = self.conv2(group_norm(self.norm2, h_BCHW, silu=True))
        return h_BCHW.add_(self.nin_shortcut(x_BCHW) if self.nin_shortcut is not None else x_BCHW)


class PixelAttention(nn.Module):
    """Single-head attention between all pixels of a map, added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, width, height, breadth = x_BCHW.shape
        qkv_BCHW = self.qkv(group_norm(self.norm, x_BCHW))
        # Pixels as rows: free of copying where the map is channels_last.
        qkv_BLC = qkv_BCHW.permute(0, 2, 3, 1).reshape(batch, 1, height * breadth, 3 * width)
        out_BLC = F.scaled_dot_product_attention(*qkv_BLC.chunk(3, dim=-1))
        out_BCHW = out_BLC.reshape(batch, height, breadth, width).permute(0, 3, 1, 2)
        result_BCHW: Tensor = self.proj_out(out_BCHW)
        return result_BCHW.add_(x_BCHW)


class Downsample(nn.Module):
    """Halve the side: a strided convolution that is padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return out_BCHW


class Upsample(nn.Module):
    """Double the side: repeat pixels, then convolve."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return out_BCHW


def _norm(width: int) -> nn.GroupNorm:
    """32 groups as published; fewer where a small width is no multiple of 32."""
    return nn.GroupNorm(math.gcd(NORM_GROUPS, width), width, eps=1e-6)
