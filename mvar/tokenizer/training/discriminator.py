"""The adversarial term: a discriminator that learns to tell reconstructed pictures from real ones, patch by patch.

A PatchGAN (Isola et al. 2017, arXiv 1611.07004) with a hinge loss, and a weight that adapts to the other terms, as in
the VQGAN (Esser et al. 2021, arXiv 2012.09841, equation 7). Unlike theirs the discriminator's norm is a group norm: a
batch norm's statistics would make the result depend on how a batch is split over processes.

Legend: B images, C channels, H = W side of a picture, P x P patches that the discriminator judges.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.tokenizer.training.config import LossConfig

M = TypeVar("M", bound=nn.Module)
GROUPS = 32
WIDEST = 8
"""Most channels of the discriminator / those of its first layer."""
BETAS = (0.5, 0.9)
"""The VQGAN's: a discriminator has to follow a moving target, so it forgets sooner."""
RATIO_EPS = 1e-4
WEIGHT_STD = 0.02
"""Of the convolutions at the start (arXiv 1611.07004, section 6.2)."""


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> logits (B, 1, P, P), above zero where a patch looks real.

    `layers` strided 4x4 convolutions that halve the side, the first of `channels`, each further one twice as wide (8
    times at most), one more without stride, and the judging one. With 3 layers a patch is 70 pixels wide.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, WIDEST)
            stride = 2 if layer < layers else 1
            # Without a bias: the norm has one.
            parts += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False)]
            parts += [nn.GroupNorm(math.gcd(GROUPS, wider // 2), wider), nn.LeakyReLU(0.2)]
            width = wider
        self.body = nn.Sequential(*parts)
        self.judge = nn.Conv2d(width, 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=WEIGHT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_B1PP: Tensor = self.judge(self.body(images_BCHW))
        return logits_B1PP


def discriminator_loss(real: Tensor, reconstructed: Tensor) -> Tensor:
    """What the discriminator minimises: logits of real patches above 1, of reconstructed ones below -1 cost nothing."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + reconstructed).mean())


def generator_loss(reconstructed: Tensor) -> Tensor:
    """What the tokenizer minimises: minus the mean logit of its pictures."""
    return -reconstructed.mean()


def adaptive_weight(of_terms: Tensor, of_generator: Tensor, factor: float, largest: float) -> float:
    """Weight of the adversarial term: `factor` x |gradient of the other terms| / |its own gradient|.

    Both at the decoder's last layer, of the whole global batch. The ratio is at most `largest`; NaN where a gradient is
    not finite, so that the step is refused.
    """
    norm, own = float(of_terms.double().norm()), float(of_generator.double().norm())
    if not math.isfinite(norm + own):
        return math.nan
    return factor * min(norm / (own + RATIO_EPS), largest)


class DiscriminatorLosses(NamedTuple):
    """What a discriminator learned from: detached scalars, means over images; the last two are logits."""

    discriminator_loss: Tensor
    discriminator_real: Tensor
    discriminator_reconstructed: Tensor


def generator_backward(network: nn.Module, images_BCHW: Tensor, autocast: torch.autocast) -> tuple[Tensor, Tensor]:
    """The generator loss of reconstructed pictures, detached, and its gradient with respect to them (B, 3, H, W)."""
    with autocast:
        logits = network(images_BCHW)
    loss = generator_loss(logits.float())
    (gradient_BCHW,) = torch.autograd.grad(loss, images_BCHW)
    return loss.detach(), gradient_BCHW


def discriminator_backward(
    network: nn.Module, images_BCHW: Tensor, reconstructed_BCHW: Tensor, autocast: torch.autocast
) -> DiscriminatorLosses:
    """Forward and backward of one replica on real and reconstructed pictures; gradients stay in its parameters."""
    network.zero_grad()
    with autocast:
        real, reconstructed = network(images_BCHW), network(reconstructed_BCHW)
    loss = discriminator_loss(real.float(), reconstructed.float())
    loss.backward()
    return DiscriminatorLosses(loss.detach(), real.detach().float().mean(), reconstructed.detach().float().mean())


class DiscriminatorTraining:
    """The discriminator, its optimizer, and its replicas (which share weights, not gradients)."""

    def __init__(
        self, config: LossConfig, seed: int, device: torch.device, replicas: int, memory_format: torch.memory_format
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = PatchDiscriminator(config.adversarial_channels, config.adversarial_layers)
        self.network: PatchDiscriminator = network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self.replicas = [self.network, *(sharing_weights(self.network) for _ in range(replicas - 1))]
        self.parameters = dict(self.network.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), betas=BETAS, weight_decay=0.0, fused=True)

    def update(self, lr: float) -> None:
        """One optimizer step with the gradients in the parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


def sharing_weights(module: M) -> M:
    """A copy with the same storage for its weights, but gradients of its own."""
    replica = copy.deepcopy(module)
    for own, shared in zip(replica.parameters(), module.parameters(), strict=True):
        own.data = shared.data
    return replica
