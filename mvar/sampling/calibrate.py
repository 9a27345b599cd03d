"""How far each precision is from fp32, for the weights at hand: the same codes through the model in each of them.

Codes are drawn in fp32; then each precision is asked for the distribution of every token, given the fp32 codes of the
coarser scales. So errors are those of one scale's arithmetic and of the state that is carried to it.

Legend: B images, L tokens, V vocabulary, S scales, P precisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mvar.errors import BackendError
from mvar.model.transformer import MVAR
from mvar.sampling.loading import ModelPair
from mvar.sampling.options import SamplingOptions, guided_scales
from mvar.sampling.pictures import Picture
from mvar.sampling.precision import PRECISIONS, SamplePrecision, arithmetic, choose
from mvar.sampling.sampler import Guided, generate_codes
from mvar.tokenizer.quantizer import Quantizer


@dataclass(frozen=True)
class Distance:
    """Of a precision from fp32, by scale."""

    precision: SamplePrecision
    divergence_S: tuple[float, ...]
    """Kullback-Leibler divergence of a token's distribution from fp32's, guided and before any filter: nats."""
    differing_S: tuple[float, ...]
    """Share of tokens whose likeliest code is another."""
    differing: float
    """The same over all tokens."""
    finite: bool


def calibrate(
    source: ModelPair,
    options: SamplingOptions,
    pictures: Sequence[Picture],
    seed: int,
    device: torch.device,
    batch: int,
) -> list[Distance]:
    """Distances of all precisions that the device has, measured on `pictures`. One model is in memory at a time."""
    labels_B = torch.tensor([picture.label for picture in pictures])
    seeds = [picture.seed(seed) for picture in pictures]
    quantizer = source.tokenizer.to(device).quantizer
    slices = [slice(first, first + batch) for first in range(0, len(pictures), batch)]
    arithmetic("fp32", device).apply()
    model = source.model("fp32", device)
    codes = [generate_codes(model, quantizer, labels_B[own], options, seeds[own]) for own in slices]

    def logits(model: MVAR) -> Iterator[list[Tensor]]:
        for own, codes_BL in zip(slices, codes, strict=True):
            yield [one.cpu() for one in _logits(model, quantizer, labels_B[own].to(device), codes_BL, options)]

    expected = list(logits(model))
    del model
    found = []
    for precision in PRECISIONS[1:]:
        try:
            choose(precision, device, None)
        except BackendError:
            continue
        arithmetic(precision, device).apply()
        found.append(_distance(precision, expected, logits(source.model(precision, device))))
    arithmetic("fp32", device).apply()
    return found


def table(distances: Sequence[Distance], images: int, options: SamplingOptions) -> str:
    """For people: a row a precision and figure, a column a scale."""
    scales = range(len(distances[0].divergence_S))
    head = "".join(f"{scale:>9}" for scale in scales)
    lines = [f"distance from fp32 over {images} images, cfg {options.cfg}, by scale:", f"{'':22}{head}{'all':>9}"]
    for one in distances:
        lines.append(f"{one.precision:5}divergence, nats " + "".join(f"{value:9.2g}" for value in one.divergence_S))
        shares = "".join(f"{share:9.2%}" for share in (*one.differing_S, one.differing))
        lines.append(f"{'':5}greedy codes      {shares[1:]}" + ("" if one.finite else "   NOT FINITE: it overflows"))
    return "\n".join(lines)


@torch.inference_mode()
def _logits(
    model: MVAR, quantizer: Quantizer, labels_B: Tensor, codes_BL: Tensor, options: SamplingOptions
) -> Iterator[Tensor]:
    """Guided logits of each scale's codes, given those of the coarser scales: (B, Lk, V) float32."""
    of_scales = options.of_scales(model.pyramid.num_scales)
    guided = Guided(model, labels_B, guided_scales(of_scales))
    inputs_BLC = quantizer.inputs_from_codes(codes_BL)
    offsets = model.pyramid.offsets
    for scale, own in enumerate(of_scales):
        inputs_BLkC = inputs_BLC[:, offsets[scale] - offsets[1] : offsets[scale + 1] - offsets[1]] if scale else None
        logits_BLV = guided(scale, inputs_BLkC, own.strength)
        yield logits_BLV.float() / own.temperature


def _distance(
    precision: SamplePrecision, expected: Sequence[Sequence[Tensor]], ours: Iterable[Sequence[Tensor]]
) -> Distance:
    scales = len(expected[0])
    divergence_S, differing_S, tokens_S = [0.0] * scales, [0] * scales, [0] * scales
    finite = True
    for exact, approximate in zip(expected, ours, strict=True):
        for scale, (x_BLV, y_BLV) in enumerate(zip(exact, approximate, strict=True)):
            finite = finite and bool(y_BLV.isfinite().all())
            # In fp64: what is left of two nearly equal distributions is smaller than fp32's rounding.
            p_BLV, q_BLV = x_BLV.double().log_softmax(dim=-1), y_BLV.double().log_softmax(dim=-1)
            divergence_S[scale] += float((p_BLV.exp() * (p_BLV - q_BLV)).sum())
            differing_S[scale] += int((x_BLV.argmax(-1) != y_BLV.argmax(-1)).sum())
            tokens_S[scale] += x_BLV.shape[0] * x_BLV.shape[1]
    return Distance(
        precision,
        tuple(total / tokens for total, tokens in zip(divergence_S, tokens_S, strict=True)),
        tuple(other / tokens for other, tokens in zip(differing_S, tokens_S, strict=True)),
        sum(differing_S) / sum(tokens_S),
        finite,
    )
