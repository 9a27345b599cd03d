"""Draws token maps from the model, coarse to fine, with classifier-free guidance. Mamba's state is carried along.

Nothing is drawn from a generator: each token has one uniform number, a hash of (the image's seed, scale, place), and is
found by inverting its distribution. So an image depends on its seed and its label, and not on its batch or the device,
up to rounding of the logits.

Shapes: B images, L tokens (Lk of scale k), V vocabulary, C latent channels, h = w side of the feature map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvar.errors import ConfigError, MvarError
from mvar.model.transformer import MVAR, DecodeState
from mvar.tokenizer.quantizer import Quantizer
from mvar.tokenizer.vqvae import VQVAE


@dataclass(frozen=True)
class ScaleSample:
    """What one scale added: its codes (B, Lk) int64 and the feature map so far (B, C, h, w) float32."""

    scale: int
    codes_BLk: Tensor
    f_hat_BChw: Tensor


def generate(
    model: nn.Module,
    tokenizer: VQVAE | Quantizer,
    labels_B: Tensor,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seeds: Iterable[int] | None = None,
    smooth: bool = False,
) -> Tensor:
    """Codes (B, L) int64 of one image for each label; see `generate_scales`."""
    steps = generate_scales(model, tokenizer, labels_B, cfg, top_k, top_p, seeds, smooth)
    return torch.cat([step.codes_BLk for step in steps], dim=1)


def generate_latent(
    model: nn.Module,
    tokenizer: VQVAE | Quantizer,
    labels_B: Tensor,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seeds: Iterable[int] | None = None,
    smooth: bool = False,
) -> Tensor:
    """Feature maps (B, C, h, w) for `VQVAE.decode_latent`; with `smooth` they are more than the codes say."""
    steps = list(generate_scales(model, tokenizer, labels_B, cfg, top_k, top_p, seeds, smooth))
    return steps[-1].f_hat_BChw


@torch.no_grad()
def generate_scales(
    model: nn.Module,
    tokenizer: VQVAE | Quantizer,
    labels_B: Tensor,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seeds: Iterable[int] | None = None,
    smooth: bool = False,
) -> Iterator[ScaleSample]:
    """Yields each scale as it is drawn, coarse to fine.

    `model`: an MVAR or a wrapper with it as `.module`, in train or eval mode. `labels_B`: int64, `num_classes` for "no
    class". `cfg`: guidance of the finest scale; it rises linearly from 0 (0: off, half the work). `top_k`: keep that
    many likeliest words and ties (0: all; 1: greedy, the lowest index of a tie). `top_p`: keep the likeliest words that
    hold this share of the probability (0 or 1: all). `seeds`: one whole number an image, default 0, 1, ... `smooth`:
    feed mixtures of words, which looks smoother and scores worse. Raises ConfigError for arguments that do not fit
    together, MvarError for logits that are not finite.
    """
    core = getattr(model, "module", model)
    quantizer = tokenizer.quantizer if isinstance(tokenizer, VQVAE) else tokenizer
    assert isinstance(core, MVAR)
    check_geometry(core, quantizer)
    device = core.pos_start.device
    labels_B = labels_B.to(device)
    seeds_B = _check_request(core, labels_B, top_k, top_p, seeds).to(device)

    guided = cfg != 0
    doubled_B = torch.cat((labels_B, torch.full_like(labels_B, core.num_classes))) if guided else labels_B
    state = DecodeState()
    f_hat_BChw = quantizer.start(len(labels_B), device)
    inputs_BLkC: Tensor | None = None
    for scale in range(core.pyramid.num_scales):
        progress = scale / max(core.pyramid.num_scales - 1, 1)
        x_BLkC = None if inputs_BLkC is None else inputs_BLkC.repeat(2 if guided else 1, 1, 1)
        logits_BLV = model(doubled_B, x_BLkC, state=state, scales=range(scale, scale + 1))
        if guided:
            with_class_BLV, without_BLV = logits_BLV.chunk(2)
            strength = cfg * progress
            logits_BLV = (1 + strength) * with_class_BLV - strength * without_BLV
        if not bool(logits_BLV.isfinite().all()):
            raise MvarError(
                f"sampling: the logits of scale {scale} are not finite. The weights are damaged or overflow in "
                f"{core.head.weight.dtype}; check the file, or sample with --precision fp32."
            )
        greedy = top_k == 1
        kept_BLV = filter_logits(logits_BLV, top_k, top_p) if smooth or not greedy else logits_BLV
        if greedy:
            codes_BLk = logits_BLV.argmax(dim=-1)  # the first of a tie
        else:
            codes_BLk = draw_codes(kept_BLV, token_uniforms(seeds_B, scale, kept_BLV.shape[1]))
        if smooth:
            words_BLkC = mix_words(kept_BLV, quantizer.embedding.weight, seeds_B, scale, progress)
            f_hat_BChw, inputs_BLkC = quantizer.add_words(f_hat_BChw, words_BLkC, scale)
        else:
            f_hat_BChw, inputs_BLkC = quantizer.add_scale(f_hat_BChw, codes_BLk, scale)
        yield ScaleSample(scale, codes_BLk, f_hat_BChw)


def filter_logits(logits_BLV: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for what is not among the `top_k` largest (ties stay), then for the tail that holds 1 - `top_p`.

    A word goes if the probability of all words up to and including it, the least likely first, is at most 1 - top_p. Of
    equally likely words the lowest index goes first.
    """
    vocab = logits_BLV.shape[-1]
    count = top_k if 0 < top_k < vocab else vocab
    nucleus = 0 < top_p < 1
    if count == vocab and not nucleus:
        return logits_BLV
    ascending_BLK = logits_BLV.topk(count, dim=-1).values.flip(-1)
    threshold_BL1, ties_BL1 = ascending_BLK[..., :1], None
    if nucleus:
        threshold_BL1, ties_BL1 = _nucleus(logits_BLV, ascending_BLK, 1 - top_p)
    removed_BLV = logits_BLV < threshold_BL1
    if ties_BL1 is not None and bool(ties_BL1.any()):
        tied_BLV = logits_BLV == threshold_BL1
        removed_BLV |= tied_BLV & (tied_BLV.cumsum(dim=-1) <= ties_BL1)
    return logits_BLV.masked_fill(removed_BLV, -torch.inf)


def _nucleus(logits_BLV: Tensor, ascending_BLK: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """The least likely word's logit outside the tail, and how many words of just that logit belong to the tail.

    `ascending`: the largest logits, sorted. Words that tie with the smallest of them count too, though not listed.
    """
    least_BL1 = ascending_BLK[..., :1]
    listed_BL1 = (ascending_BLK == least_BL1).sum(-1, keepdim=True)
    unlisted_BL1 = (logits_BLV == least_BL1).sum(-1, keepdim=True) - listed_BL1
    weights_BLK = (ascending_BLK - ascending_BLK[..., -1:]).exp()
    total_BL1 = weights_BLK.sum(-1, keepdim=True) + unlisted_BL1 * weights_BLK[..., :1]
    share_BLK = weights_BLK / total_BL1
    below_BLK = share_BLK.cumsum(-1) + unlisted_BL1 * share_BLK[..., :1]
    gone_BL1 = (below_BLK <= tail).sum(-1, keepdim=True).clamp_max(ascending_BLK.shape[-1] - 1)
    threshold_BL1 = ascending_BLK.gather(-1, gone_BL1)
    places_K = torch.arange(ascending_BLK.shape[-1], device=ascending_BLK.device)
    ties_BL1 = ((ascending_BLK == threshold_BL1) & (places_K < gone_BL1)).sum(-1, keepdim=True)
    unlisted_gone_BL1 = (tail / share_BLK[..., :1]).floor().clamp_max(unlisted_BL1).to(ties_BL1.dtype)
    unlisted_gone_BL1 = torch.where(gone_BL1 > 0, unlisted_BL1, unlisted_gone_BL1)
    return threshold_BL1, torch.where(threshold_BL1 == least_BL1, ties_BL1 + unlisted_gone_BL1, ties_BL1)


def draw_codes(logits_BLV: Tensor, uniforms_BL: Tensor) -> Tensor:
    """Inverse of the cumulative distribution, in the vocabulary's order: int64 (B, L).

    float64 sums and the fixed order keep rounding of the logits from changing a draw, but for about one in a million.
    """
    cumulated_BLV = logits_BLV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    aim_BL1 = (uniforms_BL * cumulated_BLV[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cumulated_BLV, aim_BL1, right=True).squeeze(-1)


def mix_words(logits_BLV: Tensor, words_VC: Tensor, seeds_B: Tensor, scale: int, progress: float) -> Tensor:
    """A Gumbel-softmax mixture of words for each token, sharper from scale to scale: (B, L, C) float32."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    uniforms_BLV = word_uniforms(seeds_B, scale, logits_BLV.shape[1], logits_BLV.shape[2])
    noise_BLV = -torch.log(-torch.log(uniforms_BLV))
    weights_BLV = ((logits_BLV * (1 + progress) + noise_BLV) / temperature).softmax(dim=-1)
    return weights_BLV.float() @ words_VC.float()


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


def _check_request(model: MVAR, labels_B: Tensor, top_k: int, top_p: float, seeds: Iterable[int] | None) -> Tensor:
    """The seeds as int64, after checking the arguments that a user chooses."""
    if labels_B.dim() != 1 or len(labels_B) == 0:
        raise ConfigError(f"labels: got shape {tuple(labels_B.shape)}, expected (B,) with at least one image.")
    low, high = int(labels_B.min()), int(labels_B.max())
    if low < 0 or high > model.num_classes:
        raise ConfigError(
            f"labels: got {low} to {high}, expected 0 to {model.num_classes - 1}, or {model.num_classes} for no class."
        )
    if top_k < 0 or not 0 <= top_p <= 1:
        raise ConfigError(f"top_k {top_k}, top_p {top_p}: expected top_k >= 0 and top_p from 0 to 1.")
    given = list(range(len(labels_B))) if seeds is None else [int(seed) for seed in seeds]
    if len(given) != len(labels_B):
        raise ConfigError(f"seeds: got {len(given)} for {len(labels_B)} images, expected one for each.")
    return torch.tensor([_signed(seed) for seed in given], dtype=torch.int64)


# ---- uniform numbers as a pure function of counters, alike on every device

TOKENS, WORDS = 1, 2
"""Streams of numbers."""


def token_uniforms(seeds_B: Tensor, scale: int, tokens: int) -> Tensor:
    """One number in (0, 1) for each token of a scale: float64 (B, tokens)."""
    hash_BL = _token_hash(seeds_B, TOKENS, scale, tokens)
    return (_shift_right(hash_BL, 32).double() + 0.5) / 2**32


def word_uniforms(seeds_B: Tensor, scale: int, tokens: int, words: int) -> Tensor:
    """One number in (0, 1) for each token of a scale and each word: float32 (B, tokens, words)."""
    words_V = torch.arange(words, device=seeds_B.device)
    hash_BLV = _mixed(_token_hash(seeds_B, WORDS, scale, tokens).unsqueeze(-1) ^ words_V)
    return (_shift_right(hash_BLV, 41).float() + 0.5) / 2**23


def _token_hash(seeds_B: Tensor, stream: int, scale: int, tokens: int) -> Tensor:
    hash_B = _mixed(_mixed(_mixed(seeds_B) ^ stream) ^ scale)
    return _mixed(hash_B.unsqueeze(-1) ^ torch.arange(tokens, device=seeds_B.device))


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on int64 that wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
