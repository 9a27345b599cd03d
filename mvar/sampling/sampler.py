"""Draws token maps from the model, coarse to fine, with classifier-free guidance. Mamba's state is carried along.

Nothing is drawn from a generator: each token has one uniform number, a hash of (the image's seed, scale, place), and is
found by inverting its distribution. So an image depends on its seed and its label, and not on its batch or the device,
up to rounding of the logits.

Shapes: B images, L tokens (Lk of scale k), V vocabulary, C latent channels, h = w side of the feature map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mvar.errors import ConfigError, MvarError
from mvar.model.transformer import MVAR, DecodeState
from mvar.sampling.logits import draw_codes, filter_logits, mix_code_vectors
from mvar.sampling.options import DEFAULTS, FloatTable, Guidance, IntTable, SamplingOptions, guided_scales
from mvar.sampling.uniforms import signed, token_uniforms
from mvar.tokenizer.quantizer import Quantizer
from mvar.tokenizer.vqvae import VQVAE


@dataclass(frozen=True)
class ScaleSample:
    """What one scale added: its codes (B, Lk) int64 and the feature map so far (B, C, h, w) float32."""

    scale: int
    codes_BLk: Tensor
    f_hat_BChw: Tensor
    finite: Tensor
    """bool, on the device: whether the logits were. A host that read it now would wait for the device."""


class Forced(Protocol):
    """Tokens that are given instead of drawn. Asked scale by scale, coarse to fine, and told what became of each."""

    def given(self, scale: int) -> tuple[Tensor, Tensor]:
        """Tokens of `scale` that are given, bool (B, Lk), and their codes, int64 (B, Lk); B may be 1, for all."""

    def added(self, scale: int, vectors_BLkC: Tensor) -> None:
        """The vectors of all tokens of `scale`, given and drawn, that went into the feature map."""


@dataclass(frozen=True)
class Toward:
    """A second class for each image, and how far to it: logits are (1 - share) x with the first + share x with it."""

    labels_B: Tensor
    share: float
    """From 0 to 1, where the first or the second class alone is left."""


def generate(
    model: nn.Module,
    tokenizer: VQVAE | Quantizer,
    labels_B: Tensor,
    cfg: FloatTable = DEFAULTS.cfg,
    top_k: IntTable = DEFAULTS.top_k,
    top_p: FloatTable = DEFAULTS.top_p,
    seeds: Iterable[int] | None = None,
    smooth: bool = DEFAULTS.smooth,
    temperature: FloatTable = DEFAULTS.temperature,
    guidance: Guidance = DEFAULTS.guidance,
    interval: tuple[int, int] | None = DEFAULTS.interval,
) -> Tensor:
    """`generate_codes` with its options (see SamplingOptions) as keywords: codes (B, L) int64, one image a label."""
    options = SamplingOptions(cfg, top_k, top_p, smooth, temperature, guidance, interval)
    return generate_codes(model, tokenizer, labels_B, options, seeds)


def generate_codes(
    model: nn.Module,
    tokenizer: VQVAE | Quantizer,
    labels_B: Tensor,
    options: SamplingOptions = DEFAULTS,
    seeds: Iterable[int] | None = None,
    *,
    forced: Forced | None = None,
    toward: Toward | None = None,
) -> Tensor:
    """Codes (B, L) int64 of one image for each label; see `generate_scales`."""
    steps = generate_scales(model, tokenizer, labels_B, options, seeds, forced=forced, toward=toward)
    return torch.cat([step.codes_BLk for step in steps], dim=1)


def generate_latent(
    model: nn.Module,
    tokenizer: VQVAE | Quantizer,
    labels_B: Tensor,
    options: SamplingOptions = DEFAULTS,
    seeds: Iterable[int] | None = None,
    *,
    forced: Forced | None = None,
    toward: Toward | None = None,
) -> Tensor:
    """Feature maps (B, C, h, w) for `VQVAE.decode_latent`; with `smooth` they are more than the codes say."""
    *_, last = generate_scales(model, tokenizer, labels_B, options, seeds, forced=forced, toward=toward)
    return last.f_hat_BChw


@torch.no_grad()
def generate_scales(
    model: nn.Module,
    tokenizer: VQVAE | Quantizer,
    labels_B: Tensor,
    options: SamplingOptions = DEFAULTS,
    seeds: Iterable[int] | None = None,
    *,
    forced: Forced | None = None,
    toward: Toward | None = None,
) -> Iterator[ScaleSample]:
    """Yields each scale as it is drawn, coarse to fine.

    `model`: an MVAR or a wrapper with it as `.module`, in train or eval mode. `labels_B`: int64, `num_classes` for "no
    class". `seeds`: one whole number an image, default 0, 1, ... `forced`: tokens that are not drawn (see
    `mvar.sampling.forcing`), fresh for each call; `toward`: a second class to draw between. Both on the model's device.
    Raises ConfigError for arguments that do not fit together, MvarError for logits that are not finite.
    """
    core = getattr(model, "module", model)
    quantizer = tokenizer.quantizer if isinstance(tokenizer, VQVAE) else tokenizer
    assert isinstance(core, MVAR)
    check_geometry(core, quantizer)
    device = core.pos_start.device
    seeds_B = check_request(core, labels_B, seeds).to(device)
    finite: list[Tensor] = []
    for step in draw_scales(model, quantizer, labels_B.to(device), seeds_B, options, forced, toward):
        finite.append(step.finite)
        if step.scale + 1 == core.pyramid.num_scales:
            require_finite(core, torch.stack(finite))
        yield step


def draw_scales(
    model: nn.Module,
    quantizer: Quantizer,
    labels_B: Tensor,
    seeds_B: Tensor,
    options: SamplingOptions,
    forced: Forced | None = None,
    toward: Toward | None = None,
) -> Iterator[ScaleSample]:
    """The work of `generate_scales`, with labels and seeds on the model's device. The host reads nothing back."""
    core: Any = getattr(model, "module", model)
    of_scales = options.of_scales(core.pyramid.num_scales)
    guided = Guided(model, labels_B, guided_scales(of_scales), toward)
    f_hat_BChw = quantizer.start(len(labels_B), labels_B.device)
    inputs_BLkC: Tensor | None = None
    for scale, own in enumerate(of_scales):
        logits_BLV = guided(scale, inputs_BLkC, own.strength)
        if own.temperature != 1:
            logits_BLV = logits_BLV / own.temperature
        greedy = own.top_k == 1
        kept_BLV = logits_BLV
        if options.smooth or not greedy:
            kept_BLV = filter_logits(logits_BLV, own.top_k, own.top_p)
        if greedy:
            codes_BLk = logits_BLV.argmax(dim=-1)  # the first of a tie
        else:
            codes_BLk = draw_codes(kept_BLV, token_uniforms(seeds_B, scale, kept_BLV.shape[1]))
        given_BLk = None
        if forced is not None:
            given_BLk, own_BLk = forced.given(scale)
            codes_BLk = torch.where(given_BLk, own_BLk, codes_BLk)
        vectors_BLkC = quantizer.words(codes_BLk, scale)
        if options.smooth:
            progress = scale / max(core.pyramid.num_scales - 1, 1)
            mixed_BLkC = mix_code_vectors(kept_BLV, quantizer.embedding.weight, seeds_B, scale, progress)
            if given_BLk is None:
                vectors_BLkC = mixed_BLkC
            else:
                vectors_BLkC = torch.where(given_BLk.unsqueeze(-1), vectors_BLkC, mixed_BLkC)
        f_hat_BChw, inputs_BLkC = quantizer.add_code_vectors(f_hat_BChw, vectors_BLkC, scale)
        if forced is not None:
            forced.added(scale, vectors_BLkC)
        yield ScaleSample(scale, codes_BLk, f_hat_BChw, logits_BLV.isfinite().all())


class Guided:
    """Logits of one scale after the other, coarse to fine, with classifier-free guidance.

    The same images with other labels run beside those with their own: with `toward`'s, and without a class as long as
    that is needed, in the first `doubled` scales.
    """

    def __init__(self, model: nn.Module, labels_B: Tensor, doubled: int, toward: Toward | None = None) -> None:
        core: Any = getattr(model, "module", model)
        self._model, self._batch, self._doubled, self._toward = model, len(labels_B), doubled, toward
        self._classes = (labels_B,) if toward is None else (labels_B, toward.labels_B)
        self._none_B = torch.full_like(labels_B, core.num_classes)
        self._state = DecodeState()

    def __call__(self, scale: int, inputs_BLkC: Tensor | None, strength: float) -> Tensor:
        """(B, Lk, V) of `scale`; `inputs`: what the quantizer gave for it, None at the coarsest."""
        both = scale < self._doubled
        if scale == self._doubled > 0:
            self._state.keep_first(self._batch * len(self._classes))
        labels = (*self._classes, self._none_B) if both else self._classes
        x_BLkC = None if inputs_BLkC is None else inputs_BLkC.repeat(len(labels), 1, 1)
        logits: Tensor = self._model(torch.cat(labels), x_BLkC, state=self._state, scales=range(scale, scale + 1))
        parts = logits.chunk(len(labels))
        with_class_BLV = parts[0]
        if self._toward is not None:
            with_class_BLV = (1 - self._toward.share) * parts[0] + self._toward.share * parts[1]
        return (1 + strength) * with_class_BLV - strength * parts[-1] if both else with_class_BLV


def require_finite(model: MVAR, finite_S: Tensor) -> None:
    """Raise MvarError unless the logits of every scale were finite."""
    finite = finite_S.tolist()
    if not all(finite):
        raise MvarError(
            f"sampling: the logits of scale {finite.index(False)} are not finite. The weights are damaged or overflow"
            f" in {model.head.weight.dtype}; check the file, or sample with --precision fp32."
        )


def check_geometry(model: MVAR, quantizer: Quantizer) -> None:
    """Raise ConfigError unless the model speaks this quantizer's codes."""
    ours = (model.pyramid.patch_nums, model.vocab_size, model.latent_channels)
    theirs = (quantizer.patch_nums, quantizer.vocab_size, quantizer.latent_channels)
    for what, mine, other in zip(("patch_nums", "vocab_size", "latent_channels"), ours, theirs, strict=True):
        if mine != other:
            raise ConfigError(
                f"model and tokenizer do not fit together: {what} is {mine} in the model and {other} in the "
                "tokenizer. Give the tokenizer that the model's code store was made with."
            )


def check_request(model: MVAR, labels_B: Tensor, seeds: Iterable[int] | None) -> Tensor:
    """The seeds as int64, after checking the arguments that a user chooses."""
    if labels_B.dim() != 1 or len(labels_B) == 0:
        raise ConfigError(f"labels: got shape {tuple(labels_B.shape)}, expected (B,) with at least one image.")
    low, high = int(labels_B.min()), int(labels_B.max())
    if low < 0 or high > model.num_classes:
        raise ConfigError(
            f"labels: got {low} to {high}, expected 0 to {model.num_classes - 1}, or {model.num_classes} for no class."
        )
    given = list(range(len(labels_B))) if seeds is None else [int(seed) for seed in seeds]
    if len(given) != len(labels_B):
        raise ConfigError(f"seeds: got {len(given)} for {len(labels_B)} images, expected one for each.")
    return torch.tensor([signed(seed) for seed in given], dtype=torch.int64)
