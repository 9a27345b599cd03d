"""One tokenizer in training: what a step does to it, how good it is, and what has to be saved of it.

A global batch is split over ranks, and on a CPU a rank's part over replicas, each on one thread. The split changes
nothing but rounding.

Legend: B images, C channels, H = W side of a picture, h = w side of the latent map, S scales, V words, L tokens of all
scales, N pictures or rows, W words that are replaced.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mvar.errors import TrainingError
from mvar.images.arrays import from_uint8
from mvar.log import Chosen
from mvar.randomness import uniform
from mvar.run.world import World
from mvar.threads import same_gpu
from mvar.tokenizer.quality import Quality, Tally, psnr_db
from mvar.tokenizer.quantizer import Quantized
from mvar.tokenizer.training.codebook import count_usage_, revive_, start_codebook_, usage_SV
from mvar.tokenizer.training.config import TokenizerTrainConfig
from mvar.tokenizer.training.discriminator import (
    DiscriminatorTraining,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_backward,
    generator_backward,
    sharing_weights,
)
from mvar.tokenizer.training.losses import LossTerm, Reconstruction, total_loss
from mvar.tokenizer.training.parallel import SharedRows, add_up_, part_of, require_work_for_all, whole_batch
from mvar.tokenizer.training.pictures import Pixels
from mvar.tokenizer.vqvae import VQVAE

CODEBOOK = "quantize.embedding.weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
DISCRIMINATOR = "critic"
"""What a saved state calls it, from its first format on."""
EVALUATED_AT_ONCE = 64
MEASURED_BY_SCALE = 64
"""Pictures whose first scales alone are decoded too, over all ranks."""


def _one_thread(use_gpu: Callable[[], None]) -> None:
    """How a thread of the trainer's begins."""
    use_gpu()
    torch.set_num_threads(1)


class Trainer:
    """Weights, optimizers and usage statistics, and what one step does to them.

    Everything that happens in step n is a pure function of (config, ranks, threads, state before it, pictures of step
    n): no random number generator is carried along. `terms`: the loss but for the adversarial term, which the
    configuration describes. Weights and Adam's moments are float32; convolutions run in bfloat16 if the configuration
    says so. All methods are called by all ranks together, but `reconstruct` and `tensors`.

    `threads`: on a CPU that many replicas share the weights and split the batch, each on one thread. The operations of
    a small tokenizer are so short that splitting the batch once beats splitting every operation, many times over where
    other programs want the same cores.
    """

    def __init__(self, config: TokenizerTrainConfig, terms: Sequence[LossTerm], world: World, threads: int = 1) -> None:
        require_work_for_all(config.batch, world)
        self.config, self.terms, self.world, self.device = config, terms, world, world.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            vqvae = VQVAE(**config.geometry.model_dump())
        on_gpu = self.device.type == "cuda"
        # On CPUs GroupNorm's backward pass is slow in channels_last; GPUs' convolutions prefer it.
        self._memory_format = torch.channels_last if on_gpu else torch.contiguous_format
        self.vqvae: VQVAE = vqvae.to(device=self.device, memory_format=self._memory_format)  # type: ignore[call-overload]
        self.averaged: VQVAE | None = copy.deepcopy(self.vqvae).requires_grad_(False) if config.ema_decay else None
        self.parameters = dict(self.vqvae.named_parameters())
        others = [parameter for name, parameter in self.parameters.items() if name != CODEBOOK]
        groups = [
            {"params": others, "lr_scale": 1.0},
            {"params": [self.parameters[CODEBOOK]], "lr_scale": config.codebook_lr_scale, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)
        self.step_number = 0
        threads = 1 if on_gpu else threads
        self.replicas = [self.vqvae, *(sharing_weights(self.vqvae) for _ in range(threads - 1))]
        self.discriminator: DiscriminatorTraining | None = None
        if config.loss.adversarial:
            self.discriminator = DiscriminatorTraining(
                config.loss, config.seed, self.device, threads, self._memory_format
            )
        self._pool = ThreadPoolExecutor(threads, initializer=_one_thread, initargs=(same_gpu(),))
        # One machine without these instructions decides for all: ranks must not differ.
        fast_everywhere = int(world.sum(torch.tensor([int(has_fast_bf16(self.device))]))[0]) == world.size
        self._bf16 = config.precision == "bf16" or (config.precision == "auto" and fast_everywhere)
        slow = config.precision == "auto" and not fast_everywhere
        self.chosen = [
            Chosen(
                "CPU threads",
                f"{threads} a process",
                "" if config.threads else "the cores are divided by the processes here",
            ),
            Chosen("convolutions", "bf16" if self._bf16 else "fp32", "not every process has fast bf16" if slow else ""),
        ]
        """What was decided by itself."""

    # ---- learning

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_lr` of the peak at the last step."""
        config = self.config
        if step < config.warmup_steps:
            return config.lr * (step + 1) / (config.warmup_steps + 1)
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

    def step(self, pixels_BHWC: Pixels) -> dict[str, float]:
        """One optimizer step on this rank's part of a global batch, uint8. Returns what was measured, alike everywhere.

        Raises TrainingError (RemoteError on other ranks) if the loss blows up; no weight has changed then.
        """
        config, step, world = self.config, self.step_number, self.world
        batch = self._global_batch(pixels_BHWC)
        if step == 0:
            features_BChw = whole_batch(world, self._start_features(pixels_BHWC), batch)
            start_codebook_(self.vqvae.quantizer, features_BChw, config.seed)
        discriminator = self.discriminator if step >= config.loss.adversarial_start else None
        shares, weight = self._learn_everywhere(pixels_BHWC, batch, discriminator)
        measured = self._means(shares, batch)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.clip_grad or math.inf).item()
        measured |= {"grad_norm": norm, "lr": self.learning_rate(step)}
        if discriminator is not None:
            clipped = nn.utils.clip_grad_norm_(discriminator.parameters.values(), config.clip_grad or math.inf).item()
            measured |= {"adversarial_weight": weight, "discriminator_grad_norm": clipped}
        self._require_finite(measured)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * self.learning_rate(step)
        self.optimizer.step()
        if discriminator is not None:
            discriminator.update(config.loss.adversarial_lr_scale * self.learning_rate(step))
        quantizer = self.vqvae.quantizer
        counts_SV = usage_SV(quantizer, torch.cat([share.codes_BL for share in shares]))
        count_usage_(quantizer, world.sum(counts_SV).to(counts_SV), batch, config.usage_decay)
        self._average()
        revived = 0
        if config.revive_every and (step + 1) % config.revive_every == 0 and step < config.revive_until * config.steps:
            entries_W = revive_(quantizer, self._residuals(shares, batch), config.revive_below, config.seed, step)
            self._forget_moments(entries_W)
            revived = len(entries_W)
        self.step_number += 1
        mse = measured.pop("clamped_mse")
        return {**measured, "psnr_db": psnr_db(mse), "revived": revived}

    def _global_batch(self, pixels_BHWC: Pixels) -> int:
        """Images of the step over all ranks; alone, a caller may bring any number."""
        if self.world.size == 1:
            return len(pixels_BHWC)
        assert len(pixels_BHWC) == len(part_of(self.config.batch, self.world))
        return self.config.batch

    def _learn_everywhere(
        self, pixels_BHWC: Pixels, batch: int, discriminator: DiscriminatorTraining | None
    ) -> tuple[list[_Share], float]:
        """Gradients of the whole global batch, in the parameters' `grad`; the shares of this rank's replicas and the
        weight of the adversarial term. Each replica works on its part of the images."""
        parts = np.array_split(np.arange(len(pixels_BHWC)), min(len(self.replicas), len(pixels_BHWC)))
        replicas = self.replicas[: len(parts)]
        first = part_of(batch, self.world).start
        jobs = [(pixels_BHWC[part], self._kept_scales(batch, first + part)) for part in parts]
        if discriminator is None:
            shares, weight = list(self._pool.map(self._learn, replicas, *zip(*jobs, strict=True))), 0.0
        else:
            discriminators = discriminator.replicas[: len(parts)]
            passes = list(self._pool.map(self._compare, replicas, discriminators, *zip(*jobs, strict=True)))
            weight = self._adversarial_weight(passes, batch)
            shares = list(self._pool.map(partial(self._finish, weight=weight), passes, discriminators))
            _add_gradients(discriminators, shares, batch)
        _add_gradients(replicas, shares, batch)
        modules = [self.vqvae] if discriminator is None else [self.vqvae, discriminator.network]
        # A phi convolution that no scale uses has no gradient, on no rank.
        gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        add_up_(self.world, gradients)
        return shares, weight

    def _forward(self, replica: VQVAE, pixels_BHWC: Pixels, kept_scales_B: Tensor | None) -> Reconstruction:
        """Forward pass of one replica."""
        replica.zero_grad()
        images_BCHW = self._images(pixels_BHWC)
        with self._autocast():
            f_BChw = replica.features(images_BCHW)
        quantized = replica.quantizer(f_BChw, kept_scales_B)
        with self._autocast():
            reconstructed_BCHW = replica.pixels(quantized.f_hat_BChw)
        return Reconstruction(images_BCHW, reconstructed_BCHW.float(), quantized)

    def _learn(self, replica: VQVAE, pixels_BHWC: Pixels, kept_scales_B: Tensor | None) -> _Share:
        """Forward and backward of one replica without a discriminator; gradients stay in its parameters."""
        made = self._forward(replica, pixels_BHWC, kept_scales_B)
        with self._autocast():
            loss, values = total_loss(self.terms, made)
        loss.backward()
        return _Share.of(made, {"loss": loss.detach(), **values})

    def _compare(
        self, replica: VQVAE, network: PatchDiscriminator, pixels_BHWC: Pixels, kept_scales_B: Tensor | None
    ) -> _Pass:
        """Forward of one replica, and backward through all that looks at its pictures, but not yet through itself.

        So the networks of perceptual and adversarial terms are run back through once, and their gradients at the
        decoder's last layer cost one product each.
        """
        made = self._forward(replica, pixels_BHWC, kept_scales_B)
        cut_BCHW = made.reconstructed_BCHW.detach().requires_grad_()
        cut = Reconstruction(made.images_BCHW, cut_BCHW, made.quantized)
        with self._autocast():
            on_pictures, values = total_loss([term for term in self.terms if not term.of_latents], cut)
            on_latents, more_values = total_loss([term for term in self.terms if term.of_latents], cut)
        (of_terms_BCHW,) = torch.autograd.grad(on_pictures, cut_BCHW)
        generator_loss, of_generator_BCHW = generator_backward(network, cut_BCHW, self._autocast())
        last = replica.decoder.conv_out.weight
        at_last = [
            torch.autograd.grad(made.reconstructed_BCHW, last, gradient_BCHW, retain_graph=True)[0]
            for gradient_BCHW in (of_terms_BCHW, of_generator_BCHW)
        ]
        loss = (on_pictures + on_latents).detach()
        values = {"loss": loss, **values, **more_values, "generator_loss": generator_loss}
        return _Pass(made, on_latents, of_terms_BCHW, of_generator_BCHW, torch.stack(at_last), values)

    def _adversarial_weight(self, passes: Sequence[_Pass], batch: int) -> float:
        """From the gradients of the whole global batch: the same on every rank, however it is split."""
        shares = [len(one.made.images_BCHW) / batch for one in passes]
        own = torch.stack([share * one.at_last.double() for share, one in zip(shares, passes, strict=True)]).sum(dim=0)
        of_terms, of_generator = self.world.sum(own)
        loss = self.config.loss
        return adaptive_weight(of_terms, of_generator, loss.adversarial, loss.adversarial_largest)

    def _finish(self, one: _Pass, network: PatchDiscriminator, weight: float) -> _Share:
        """The rest of the backward pass, and the discriminator's own on the same pictures."""
        gradient_BCHW = one.of_terms_BCHW + weight * one.of_generator_BCHW
        if one.on_latents.requires_grad:
            torch.autograd.backward([one.made.reconstructed_BCHW, one.on_latents], [gradient_BCHW, None])
        else:
            one.made.reconstructed_BCHW.backward(gradient_BCHW)
        pictures = one.made.images_BCHW, one.made.reconstructed_BCHW.detach()
        losses = discriminator_backward(network, *pictures, self._autocast())
        return _Share.of(one.made, {**one.values, **losses._asdict()})

    def _means(self, shares: Sequence[_Share], batch: int) -> dict[str, float]:
        """Means over the images of all ranks."""
        names = list(shares[0].measured)
        sums = [sum(share.images * share.measured[name] for share in shares) for name in names]
        totals = self.world.sum(torch.tensor(sums, dtype=torch.float64))
        return dict(zip(names, (totals / batch).tolist(), strict=True))

    def _require_finite(self, measured: Mapping[str, float]) -> None:
        """All ranks see the same numbers, and stop together."""
        wrong = {name: value for name, value in measured.items() if not math.isfinite(value)}
        if not wrong:
            return
        error = TrainingError(
            f"tokenizer training: loss {measured['loss']}, gradient norm {measured['grad_norm']}"
            f" ({', '.join(wrong)} not finite) at step {self.step_number}; expected finite numbers. Lower lr, or set"
            " precision=fp32; the last saved state is whole."
        )
        self.world.raise_together(error if self.world.is_main else None)

    def _residuals(self, shares: Sequence[_Share], batch: int) -> SharedRows:
        """Every vector that was quantized in this step, image by image, coarse to fine."""
        own_BLC = torch.cat([share.residuals_BLC() for share in shares])
        return SharedRows(self.world, own_BLC.flatten(0, 1), own_BLC.shape[1], batch)

    # ---- judging

    @property
    def result(self) -> VQVAE:
        """The tokenizer to use: averaged weights if they are kept."""
        return self.vqvae if self.averaged is None else self.averaged

    def reconstruct(self, pixels_NHWC: Pixels) -> tuple[Tensor, Tensor]:
        """Pictures through `result`, float32: (N, 3, H, W) in [-1, 1] and codes (N, L), on the CPU."""
        starts = range(0, len(pixels_NHWC), EVALUATED_AT_ONCE)
        parts = list(self._pool.map(self._reconstruct, (pixels_NHWC[i : i + EVALUATED_AT_ONCE] for i in starts)))
        return torch.cat([reconstructed for reconstructed, _ in parts]), torch.cat([codes for _, codes in parts])

    def _reconstruct(self, pixels_BHWC: Pixels) -> tuple[Tensor, Tensor]:
        codes_BL = self.result.encode(self._images(pixels_BHWC))
        return self.result.decode(codes_BL).cpu(), codes_BL.cpu()

    def _reconstruct_scale(self, codes_BL: Tensor, scales: int) -> Tensor:
        """Codes (B, L) -> pictures of their first `scales` scales, on the CPU."""
        latent_BChw = self.result.quantizer.latent_from_codes(codes_BL.to(self.device), scales)
        return self.result.decode_latent(latent_BChw).cpu()

    def quality(self, pixels_NHWC: Pixels) -> Quality:
        """Quality on the pictures of all ranks together; `pixels_NHWC`: this rank's part of them, uint8."""
        scales = self.vqvae.quantizer.pyramid.num_scales
        tally = Tally(scales, self.vqvae.vocab_size)
        codes = []
        # Block by block: SSIM needs fifteen times the memory of the pictures.
        at_once = EVALUATED_AT_ONCE * len(self.replicas)
        for start in range(0, len(pixels_NHWC), at_once):
            block_NHWC = pixels_NHWC[start : start + at_once]
            reconstructed_NCHW, codes_NL = self.reconstruct(block_NHWC)
            tally.add(from_uint8(block_NHWC), reconstructed_NCHW, usage_SV(self.vqvae.quantizer, codes_NL))
            codes.append(codes_NL)
        if codes:
            share = min(len(pixels_NHWC), max(1, MEASURED_BY_SCALE // self.world.size))
            few = np.linspace(0, len(pixels_NHWC) - 1, share).round().astype(np.int64)
            codes_NL = torch.cat(codes)[torch.from_numpy(few)]
            by_scale = self._pool.map(self._reconstruct_scale, repeat(codes_NL), range(1, scales + 1))
            tally.add_scales(from_uint8(pixels_NHWC[few]), list(by_scale))
        return tally.quality(self.world.sum(tally.sums))

    # ---- what a saved state holds

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their averages, moments, the discriminator's: float32, on the CPU."""
        found = {f"model.{name}": value for name, value in self.vqvae.state_dict().items()}
        if self.averaged is not None:
            found |= {f"averaged.{name}": value for name, value in self.averaged.state_dict().items()}
        found |= _moments("", self.parameters, self.optimizer)
        if self.discriminator is not None:
            found |= {
                f"{DISCRIMINATOR}.{name}": value for name, value in self.discriminator.network.state_dict().items()
            }
            found |= _moments(f"{DISCRIMINATOR}_", self.discriminator.parameters, self.discriminator.optimizer)
        return {
            name: value.detach().cpu().contiguous(memory_format=torch.contiguous_format)
            for name, value in found.items()
        }

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take up what `tensors` gave after `step` steps of a training of the same configuration."""
        self.vqvae.load_state_dict(_part(tensors, "model."))
        if self.averaged is not None:
            self.averaged.load_state_dict(_part(tensors, "averaged."))
        self.step_number = step
        _restore_moments("", tensors, self.parameters, self.optimizer, step)
        if self.discriminator is not None:
            self.discriminator.network.load_state_dict(_part(tensors, f"{DISCRIMINATOR}."))
            learned = max(0, step - self.config.loss.adversarial_start)
            parameters, optimizer = self.discriminator.parameters, self.discriminator.optimizer
            _restore_moments(f"{DISCRIMINATOR}_", tensors, parameters, optimizer, learned)

    # ---- inside

    def _images(self, pixels_BHWC: Pixels) -> Tensor:
        return from_uint8(pixels_BHWC).to(self.device).contiguous(memory_format=self._memory_format)

    @torch.no_grad()
    def _start_features(self, pixels_BHWC: Pixels) -> Tensor:
        """float32, whatever the precision: there is no hurry."""
        return self.vqvae.features(self._images(pixels_BHWC))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)

    def _kept_scales(self, batch: int, part: npt.NDArray[np.int64]) -> Tensor | None:
        """Scale dropout: a share of the batch is decoded from its first scales. Scales kept at the places in `part`."""
        scales = self.vqvae.quantizer.pyramid.num_scales
        if not self.config.scale_dropout or scales == 1:
            return None
        drawn = uniform(self.config.seed, "scale_dropout", self.step_number, np.arange(batch)[:, None], [0, 1])[part]
        kept_B = np.where(drawn[:, 0] < self.config.scale_dropout, 1 + (drawn[:, 1] * (scales - 1)).astype(int), scales)
        return torch.from_numpy(kept_B).to(self.device)

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is None:
            return
        # Shorter memory at first, so that the start is forgotten.
        decay = min(self.config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        for mean, value in zip(self.averaged.parameters(), self.vqvae.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for mean_buffer, buffer in zip(self.averaged.buffers(), self.vqvae.buffers(), strict=True):
            mean_buffer.copy_(buffer)

    @torch.no_grad()
    def _forget_moments(self, entries_W: Tensor) -> None:
        """A revived word has no past."""
        state = self.optimizer.state[self.parameters[CODEBOOK]]
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment][entries_W] = 0
        if self.averaged is not None:
            mean_VC, weight_VC = self.averaged.quantizer.embedding.weight, self.vqvae.quantizer.embedding.weight
            mean_VC.index_copy_(0, entries_W, weight_VC[entries_W])


@dataclass(frozen=True)
class _Pass:
    """One replica on its part of a batch, before it is known how much the adversarial term weighs."""

    made: Reconstruction
    on_latents: Tensor
    of_terms_BCHW: Tensor
    """Gradient of the terms that look at pictures, with respect to the reconstructed ones."""
    of_generator_BCHW: Tensor
    """The same of the adversarial term, unweighted."""
    at_last: Tensor
    """Both of them at the decoder's last layer, (2, ...)."""
    values: dict[str, Tensor]


@dataclass(frozen=True)
class _Share:
    """What one replica did with its part of a batch."""

    images: int
    measured: dict[str, float]
    quantized: Quantized

    @staticmethod
    def of(made: Reconstruction, values: Mapping[str, Tensor]) -> _Share:
        error_BCHW = made.reconstructed_BCHW.detach().clamp(-1, 1) - made.images_BCHW
        measured = {**values, "clamped_mse": error_BCHW.square().mean()}
        images = len(made.images_BCHW)
        return _Share(images, {name: value.item() for name, value in measured.items()}, made.quantized)

    @property
    def codes_BL(self) -> Tensor:
        return self.quantized.codes_BL

    def residuals_BLC(self) -> Tensor:
        return torch.cat([rows_NC.unflatten(0, (self.images, -1)) for rows_NC in self.quantized.residuals_k], dim=1)


def _add_gradients(replicas: Sequence[nn.Module], shares: Sequence[_Share], batch: int) -> None:
    """Put this rank's part of the global mean gradient into the first replica."""
    for gathered, *others in zip(*(replica.parameters() for replica in replicas), strict=True):
        if gathered.grad is None:  # A phi convolution that no scale uses.
            continue
        gathered.grad.mul_(shares[0].images / batch)
        for other, share in zip(others, shares[1:], strict=True):
            assert other.grad is not None
            gathered.grad.add_(other.grad, alpha=share.images / batch)


def _moments(
    prefix: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return {
        f"{prefix}{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def _restore_moments(
    prefix: str,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> None:
    moments = {moment: _part(tensors, f"{prefix}{moment}.") for moment in MOMENTS}
    for name, parameter in parameters.items():
        if name in moments[MOMENTS[0]]:
            done = torch.tensor(float(steps), device=parameter.device)
            optimizer.state[parameter] = {"step": done} | {
                moment: torch.empty_like(parameter).copy_(values[name]) for moment, values in moments.items()
            }


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def has_fast_bf16(device: torch.device) -> bool:
    """Whether this machine has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
