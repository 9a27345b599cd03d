"""One tokenizer in training: its step, its state on disk, and how good it is.

Legend: B images, C channels, H = W side of a picture, h = w side of the latent map, S scales, V words, L tokens of all
scales.
"""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mvar.errors import CheckpointError, MvarError
from mvar.images import from_uint8
from mvar.randomness import uniform
from mvar.tokenizer.codebook import count_usage_, revive_, start_codebook_, usage_SV
from mvar.tokenizer.files import digest_of, write_atomically
from mvar.tokenizer.losses import LossTerm, Rebuilt, total_loss
from mvar.tokenizer.pictures import Pixels
from mvar.tokenizer.settings import TokenizerTrainConfig
from mvar.tokenizer.vqvae import VQVAE

STATE_FORMAT = 1
CODEBOOK = "quantize.embedding.weight"
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class Quality:
    """How well held-out pictures survive, and how the codebook is used."""

    psnr_db: float
    """Mean over pictures, of clamped reconstructions, against the full range [-1, 1]."""
    l1: float
    used_share: float
    """Words used at least once by any scale."""
    used_S: list[float]
    """Words used at least once, by scale."""
    perplexity_S: list[float]
    """exp(entropy) of each scale's words: as many equally frequent words would carry as much."""


class Trainer:
    """Weights, optimizer and usage statistics, and what one step does to them.

    Everything that happens in step n is a pure function of (config, threads, state before it, pictures of step n): no
    random number generator is carried along. `terms`: the loss. Weights and Adam's moments are float32; convolutions
    run in bfloat16 if the configuration says so.

    `threads`: on a CPU that many replicas share the weights and split the batch, each on one thread. The operations of
    a small tokenizer are so short that splitting the batch once beats splitting every operation, many times over where
    other programs want the same cores.
    """

    def __init__(
        self, config: TokenizerTrainConfig, terms: list[LossTerm], device: torch.device, threads: int = 1
    ) -> None:
        self.config, self.terms, self.device = config, terms, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            vqvae = VQVAE(**config.geometry.model_dump())
        # On CPUs GroupNorm's backward pass is slow in channels_last; GPUs' convolutions prefer it.
        self._memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.vqvae: VQVAE = vqvae.to(device=device, memory_format=self._memory_format)  # type: ignore[call-overload]
        self.averaged: VQVAE | None = copy.deepcopy(self.vqvae).requires_grad_(False) if config.ema_decay else None
        self.parameters = dict(self.vqvae.named_parameters())
        others = [parameter for name, parameter in self.parameters.items() if name != CODEBOOK]
        groups = [
            {"params": others, "lr_scale": 1.0},
            {"params": [self.parameters[CODEBOOK]], "lr_scale": config.codebook_lr_scale, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)
        self.step_number = 0
        threads = threads if device.type == "cpu" else 1
        self.replicas = [self.vqvae, *(_sharing_weights(self.vqvae) for _ in range(threads - 1))]
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self._bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))

    # ---- learning

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_lr` of the peak at the last step."""
        config = self.config
        if step < config.warmup_steps:
            return config.lr * (step + 1) / (config.warmup_steps + 1)
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

    def step(self, pixels_BHWC: Pixels) -> dict[str, float]:
        """One optimizer step on uint8 pictures. Returns what was measured. Raises MvarError if the loss blows up."""
        config, step = self.config, self.step_number
        if step == 0:
            start_codebook_(self.vqvae.quantizer, self._start_features(pixels_BHWC), config.seed)
        shares = self._learn_everywhere(pixels_BHWC)
        measured = {
            name: sum(share.images * share.measured[name] for share in shares) / len(pixels_BHWC)
            for name in shares[0].measured
        }
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.clip_grad or math.inf).item()
        if not math.isfinite(measured["loss"] + norm):
            raise MvarError(
                f"tokenizer training: loss {measured['loss']}, gradient norm {norm} at step {step}; expected finite"
                " numbers. Lower lr, or set precision=fp32; the last saved state is whole."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * self.learning_rate(step)
        self.optimizer.step()
        count_usage_(self.vqvae.quantizer, torch.cat([share.codes_BL for share in shares]), config.usage_decay)
        self._average()
        revived = 0
        if config.revive_every and (step + 1) % config.revive_every == 0 and step < config.revive_until * config.steps:
            residuals_NC = torch.cat([share.residuals_NC for share in shares])
            words_W = revive_(self.vqvae.quantizer, residuals_NC, config.revive_below, config.seed, step)
            self._forget_moments(words_W)
            revived = len(words_W)
        self.step_number += 1
        return {
            **{name: value for name, value in measured.items() if name != "clamped_mse"},
            "psnr_db": psnr_db(measured["clamped_mse"]),
            "grad_norm": norm,
            "lr": self.learning_rate(step),
            "revived": revived,
        }

    def _learn_everywhere(self, pixels_BHWC: Pixels) -> list[_Share]:
        """Gradients of the whole batch, in the parameters' `grad`. Each replica works on its part of the images."""
        parts = np.array_split(np.arange(len(pixels_BHWC)), min(len(self.replicas), len(pixels_BHWC)))
        replicas = self.replicas[: len(parts)]
        jobs = [(pixels_BHWC[part], self._kept_scales(len(pixels_BHWC), part)) for part in parts]
        shares = list(self._pool.map(self._learn, replicas, *zip(*jobs, strict=True)))
        for gathered, *others in zip(*(replica.parameters() for replica in replicas), strict=True):
            if gathered.grad is None:  # A phi convolution that no scale uses.
                continue
            gathered.grad.mul_(shares[0].images / len(pixels_BHWC))
            for other, share in zip(others, shares[1:], strict=True):
                assert other.grad is not None
                gathered.grad.add_(other.grad, alpha=share.images / len(pixels_BHWC))
        return shares

    def _learn(self, replica: VQVAE, pixels_BHWC: Pixels, kept_scales_B: Tensor | None) -> _Share:
        """Forward and backward of one replica; gradients stay in its parameters."""
        replica.zero_grad()
        images_BCHW = self._images(pixels_BHWC)
        with self._autocast():
            f_BChw = replica.features(images_BCHW)
        quantized = replica.quantizer(f_BChw, kept_scales_B)
        with self._autocast():
            rebuilt_BCHW = replica.pixels(quantized.f_hat_BChw)
        loss, values = total_loss(self.terms, Rebuilt(images_BCHW, rebuilt_BCHW.float(), quantized))
        loss.backward()
        clamped_mse = (rebuilt_BCHW.detach().float().clamp(-1, 1) - images_BCHW).square().mean()
        measured = {"loss": loss.detach()} | values | {"clamped_mse": clamped_mse}
        return _Share(
            images=len(images_BCHW),
            measured={name: value.item() for name, value in measured.items()},
            codes_BL=quantized.codes_BL,
            residuals_NC=torch.cat(quantized.residuals_k),
        )

    # ---- judging

    @property
    def result(self) -> VQVAE:
        """The tokenizer to use: averaged weights if they are kept."""
        return self.vqvae if self.averaged is None else self.averaged

    def rebuild(self, pixels_NHWC: Pixels) -> tuple[Tensor, Tensor]:
        """Pictures through `result`, float32: (N, 3, H, W) in [-1, 1] and codes (N, L), on the CPU."""
        starts = range(0, len(pixels_NHWC), EVALUATED_AT_ONCE)
        parts = list(self._pool.map(self._rebuild, (pixels_NHWC[i : i + EVALUATED_AT_ONCE] for i in starts)))
        return torch.cat([rebuilt for rebuilt, _ in parts]), torch.cat([codes for _, codes in parts])

    def _rebuild(self, pixels_BHWC: Pixels) -> tuple[Tensor, Tensor]:
        codes_BL = self.result.encode(self._images(pixels_BHWC))
        return self.result.decode(codes_BL).cpu(), codes_BL.cpu()

    def quality(self, pixels_NHWC: Pixels) -> Quality:
        """Quality on uint8 pictures (N, H, W, 3)."""
        rebuilt_NCHW, codes_NL = self.rebuild(pixels_NHWC)
        difference_NCHW = rebuilt_NCHW - from_uint8(pixels_NHWC)
        mse_N = difference_NCHW.square().mean(dim=(1, 2, 3))
        counts_SV = usage_SV(self.vqvae.quantizer, codes_NL)
        shares_SV = counts_SV / counts_SV.sum(dim=1, keepdim=True)
        entropy_S = -torch.xlogy(shares_SV, shares_SV).sum(dim=1)
        vocab_size = self.vqvae.vocab_size
        return Quality(
            psnr_db=float(np.mean([psnr_db(mse) for mse in mse_N.tolist()])),
            l1=difference_NCHW.abs().mean().item(),
            used_share=(counts_SV.sum(dim=0) > 0).sum().item() / vocab_size,
            used_S=(counts_SV > 0).sum(dim=1).tolist(),
            perplexity_S=entropy_S.exp().tolist(),
        )

    # ---- state on disk

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write everything a later `restore` needs: complete or absent. `identity`: what may not change meanwhile."""
        tensors = {f"model.{name}": value for name, value in self.vqvae.state_dict().items()}
        if self.averaged is not None:
            tensors |= {f"averaged.{name}": value for name, value in self.averaged.state_dict().items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        tensors = {
            name: value.detach().cpu().contiguous(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        header = {
            "kind": "tokenizer-training",
            "format": STATE_FORMAT,
            "step": self.step_number,
            "identity": identity,
            "digest": digest_of(tensors),
        }
        try:
            write_atomically(path, safetensors.torch.save(tensors, {"mvar": json.dumps(header, sort_keys=True)}))
        except OSError as error:
            raise CheckpointError(
                f"training state {path}: cannot be written ({error.strerror}). Free some space; the state saved before"
                " is whole, and the same command goes on from it."
            ) from None

    def restore(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from a saved state. Raises CheckpointError if it is damaged or belongs to another training."""
        tensors, header = _read_state(path)
        changed = [
            f"{key}: {header['identity'].get(key)!r} then, {identity.get(key)!r} now"
            for key in sorted(header["identity"].keys() | identity.keys())
            if header["identity"].get(key) != identity.get(key)
        ]
        if changed:
            raise CheckpointError(
                f"training state {path}: it belongs to another training ({'; '.join(changed)}). Give another out=..."
                " folder, or the settings it was started with."
            )
        self.vqvae.load_state_dict(_part(tensors, "model."))
        if self.averaged is not None:
            self.averaged.load_state_dict(_part(tensors, "averaged."))
        self.step_number = header["step"]
        moments = {moment: _part(tensors, f"{moment}.") for moment in ("exp_avg", "exp_avg_sq")}
        for name, parameter in self.parameters.items():
            if name in moments["exp_avg"]:
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step_number))} | {
                    moment: torch.empty_like(parameter).copy_(values[name]) for moment, values in moments.items()
                }

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
    def _forget_moments(self, words_W: Tensor) -> None:
        """A revived word has no past."""
        state = self.optimizer.state[self.parameters[CODEBOOK]]
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment][words_W] = 0
        if self.averaged is not None:
            mean_VC, weight_VC = self.averaged.quantizer.embedding.weight, self.vqvae.quantizer.embedding.weight
            mean_VC.index_copy_(0, words_W, weight_VC[words_W])


@dataclass(frozen=True)
class _Share:
    """What one replica did with its part of a batch."""

    images: int
    measured: dict[str, float]
    codes_BL: Tensor
    residuals_NC: Tensor


def _sharing_weights(vqvae: VQVAE) -> VQVAE:
    """A copy with the same storage for its weights, but gradients of its own."""
    replica = copy.deepcopy(vqvae)
    for own, shared in zip(replica.parameters(), vqvae.parameters(), strict=True):
        own.data = shared.data
    return replica


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1], in decibels; at most 100."""
    return 10 * math.log10(4 / max(mse, 4e-10))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("mvar", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if header.get("kind") != "tokenizer-training" or header.get("format") != STATE_FORMAT:
            raise ValueError("not the state of a tokenizer's training, or of another version")
        if header["digest"] != digest_of(tensors):
            raise ValueError("its contents do not match their digest")
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"training state {path}: damaged ({error}). Remove it to start again, or put back a whole copy."
        ) from None
    return tensors, header


def has_fast_bf16(device: torch.device) -> bool:
    """Whether this machine has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
