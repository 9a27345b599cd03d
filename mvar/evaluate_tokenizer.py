"""`mvar evaluate-tokenizer`: how well pictures survive a tokenizer, on a store and the images that it was made of.

    mvar evaluate-tokenizer --tokenizer vae.pth --store codes --images imagenet --features inception-2015-12-05.pt

Prints rFID (with Inception's features; otherwise rFD-efflite0), PSNR, SSIM, L1, LPIPS (with its file), and for each
scale how much of the codebook is in use and the entropy of its words.

Legend: B pictures of a block, H, W pixels, L tokens, S scales, V words.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mvar.cli import run_command
from mvar.data.manifest import Manifest
from mvar.errors import ConfigError, MvarError, TokenizerError
from mvar.evaluation import told
from mvar.evaluation.extractors import Extractor, open_extractor
from mvar.evaluation.features import extract
from mvar.evaluation.figures import PARTS, Figure, all_figures
from mvar.evaluation.lpips import Lpips
from mvar.evaluation.pictures import I64, PictureSet, SkipBad
from mvar.evaluation.real import RealImages, add_arguments
from mvar.evaluation.reference import Reference, make_reference, read_reference
from mvar.files.disk import write_text
from mvar.images.arrays import Bytes, from_uint8, to_uint8
from mvar.log import log
from mvar.model.kernels.arithmetic import ieee
from mvar.sampling.loading import pick_device
from mvar.tokenizer.files import load_tokenizer, sha256_of
from mvar.tokenizer.quality import Tally
from mvar.tokenizer.training.codebook import usage_SV
from mvar.tokenizer.vqvae import VQVAE
from mvar.version import __version__

OF_RECONSTRUCTIONS = ("frechet", "spatial_frechet", "kernel")
"""Distances that say something of reconstructions; each has its original among the reference."""


class Reconstructed:
    """Pictures after the tokenizer. What is lost is added up while they are read."""

    def __init__(self, pictures: PictureSet, vqvae: VQVAE, device: torch.device, lpips: Lpips | None) -> None:
        self.where, self.size = f"reconstructions of {pictures.where}", pictures.size
        self.tally = Tally(vqvae.quantizer.pyramid.num_scales, vqvae.vocab_size)
        self.lpips_sum = 0.0
        self._pictures, self._vqvae, self._device, self._lpips = pictures, vqvae, device, lpips

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def labels_N(self) -> I64 | None:
        return self._pictures.labels_N

    @torch.no_grad()
    def blocks(self, batch: int) -> Iterator[Bytes]:
        """As `PictureSet`: reconstructions, clamped and rounded to bytes."""
        for block_BHWC in self._pictures.blocks(batch):
            images_BCHW = from_uint8(block_BHWC)
            with ieee(self._device):
                codes_BL = self._vqvae.encode(images_BCHW.to(self._device))
                again_BCHW = self._vqvae.decode(codes_BL).float().clamp(-1, 1).cpu()
            self.tally.add(images_BCHW, again_BCHW, usage_SV(self._vqvae.quantizer, codes_BL.cpu()))
            again_BHWC = to_uint8(again_BCHW)
            if self._lpips is not None:
                self.lpips_sum += float(self._lpips(block_BHWC, again_BHWC).sum())
            yield again_BHWC


def evaluate_tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns what is written as JSON. Raises MvarError."""
    device = pick_device(args.device)
    vqvae = (
        load_tokenizer(args.tokenizer, {"patch_nums": args.patch_nums} if args.patch_nums else None).to(device).eval()
    )
    digest = sha256_of(args.tokenizer)
    real = RealImages.of(args, vqvae.image_size)
    if real.size != vqvae.image_size:
        raise ConfigError(f"--size {real.size}: the tokenizer takes pictures of {vqvae.image_size} px.")
    if args.store is not None and Manifest.read(args.store).tokenizer.sha256 != digest:
        raise TokenizerError(f"--tokenizer {args.tokenizer}: not the one that made the codes of --store {args.store}.")
    split, bad = args.split or "val", SkipBad(args.skip_bad)
    pictures = real.pictures(split, args.count, bad)
    lpips = None if args.lpips is None else Lpips(args.lpips, device)
    reconstructed = Reconstructed(pictures, vqvae, device, lpips)
    extractor = the_extractor(args, device)
    distances: dict[str, Figure] = {}
    warnings: list[str] = []
    if extractor is None:
        for _ in reconstructed.blocks(args.batch):
            pass
        warnings.append("rFID is left out: no --features, and the packages of EfficientNet-Lite0 are not installed.")
    else:
        reference = the_reference(args, real, extractor, split)
        reference.require_like(extractor, (real.size, real.size), "the reference")
        found = extract(reconstructed, extractor, batch=args.batch, parts=PARTS)
        every = all_figures(found, reference, device, reconstructed.where, floor=False)
        distances = {name: every[name] for name in OF_RECONSTRUCTIONS if name in every}
        if len(found.features_NF) != told.PAPER_IMAGES:
            warnings.append(
                f"{len(found.features_NF):,} images, papers' rFID is of {told.PAPER_IMAGES:,}: it is biased."
            )
    quality = reconstructed.tally.quality(reconstructed.tally.sums)
    figures: dict[str, float] = {}
    if extractor is not None:
        figures = {f"r{name}": value for name, value in told.keys(distances, extractor.identity).items()}
    figures |= {"psnr_db": quality.psnr_db, "ssim": quality.ssim, "l1": quality.l1}
    if lpips is not None:
        figures["lpips"] = reconstructed.lpips_sum / quality.images
    figures["codebook_used"] = quality.used_share
    entropy_S = [math.log2(perplexity) for perplexity in quality.perplexity_per_scale]
    for scale, (used, entropy) in enumerate(zip(quality.used_per_scale, entropy_S, strict=True), start=1):
        figures |= {f"words_scale_{scale}": used, f"entropy_bits_scale_{scale}": entropy}
    print(table(figures, vqvae, quality.images, warnings))
    context = {
        "tokenizer": str(args.tokenizer),
        "tokenizer_sha256": digest,
        "images": quality.images,
        "split": split,
        "real": real.describe(),
        "left_out": bad.left_out,
        "features": None if extractor is None else vars(extractor.identity),
        "lpips": None if lpips is None else lpips.sha256,
        "arithmetic": "fp32",
        "versions": {"mvar": __version__, "torch": torch.__version__},
        "warnings": warnings,
    }
    return {"name": "evaluate-tokenizer", "figures": figures, "goals": {}, "context": context}


def the_extractor(args: argparse.Namespace, device: torch.device) -> Extractor | None:
    """That of --features or of the packages; None where there is neither, for PSNR and the codebook need none."""
    try:
        return open_extractor(args.features, device)
    except MvarError as error:
        if args.features is not None:
            raise
        log.warning("%s", error)
        return None


def the_reference(args: argparse.Namespace, real: RealImages, extractor: Extractor, split: str) -> Reference:
    """Statistics of the same images, from --reference if it exists, else made, and kept there."""
    if args.reference is not None and args.reference.exists():
        return read_reference(args.reference, extractor, batch=args.batch)
    bad = SkipBad(args.skip_bad)
    made = make_reference(real, extractor, split, count=args.count, batch=args.batch, bad=bad, floor=False)
    if args.reference is not None:
        made.write(args.reference)
    return made


def table(figures: dict[str, float], vqvae: VQVAE, images: int, warnings: list[str]) -> str:
    """For people."""
    scales = vqvae.quantizer.pyramid.num_scales
    plain = {name: value for name, value in figures.items() if "_scale_" not in name}
    lines = [f"{name:22}{value:>12.4f}" for name, value in plain.items()]
    lines += ["", f"{'scale':>8}{'words in use':>14}{'of':>8}{'entropy, bits':>16}"]
    for scale in range(1, scales + 1):
        used, entropy = figures[f"words_scale_{scale}"], figures[f"entropy_bits_scale_{scale}"]
        lines.append(f"{scale:>8}{used:>14,.0f}{vqvae.vocab_size:>8,}{entropy:>16.3f}")
    return "\n".join([*lines, "", f"{images:,} images", *(f"! {warning}" for warning in warnings)])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar evaluate-tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="tokenizer file (.safetensors, or the published .pth)")
    add("--patch-nums", type=int, nargs="+", help="sides of the token maps, where the file does not say")
    add("--features", type=Path, help="Inception's file: TorchScript, or torch-fidelity's .pth (default: efflite0)")
    add("--reference", type=Path, help=".npz of `mvar reference` of the same split; made if it does not exist")
    add("--lpips", type=Path, help="TorchScript VGG16 that StyleGAN publishes for LPIPS (vgg16.pt)")
    add("--count", type=int, metavar="N", help="images, evenly chosen (default: all)")
    add("--batch", type=int, default=32, help="pictures in the networks at once (default 32)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    add("--json", type=Path, help="write the figures, and how they were made, here")
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.batch < 1 or (args.count is not None and args.count < 2):
        raise ConfigError("--batch: expected a whole number from 1; --count: from 2.")
    payload = evaluate_tokenizer(args)
    if args.json is not None:
        write_text(args.json, json.dumps(payload, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
