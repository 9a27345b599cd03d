"""Parts of `benchmarks.gpu` that draw and read pictures."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_context import Context, with_mixer
from benchmarks.gpu_profile import profile_calls
from benchmarks.harness import spread
from mvar.config import MambaBackend

SAMPLED = 128


def tokenizer_of(context: Context) -> Any:
    from mvar import VQVAE

    torch.manual_seed(0)
    with context.device:
        return VQVAE(**context.scale.tokenizer).eval()


def sampling(context: Context, name: str, drawing: Callable[[Any, int], Callable[[Tensor, range], Tensor]]) -> None:
    """`drawing(tokenizer, images)` gives a function of that many labels and seeds that draws pictures."""
    tokenizer = tokenizer_of(context).to(memory_format=torch.channels_last)

    def drawn(images: int) -> Callable[[], Tensor]:
        draw, labels_B = drawing(tokenizer, images), torch.arange(images) % 1000
        return lambda: draw(labels_B, range(images))

    images = context.scale.images(SAMPLED)
    draw = drawn(images)
    taken = context.timed(draw, 3, 2)
    context.add(f"{name}_imgs_per_s", images / statistics.median(taken), spread(taken) | {"batch": images})
    if name == "sample_d16":
        taken = context.timed(drawn(1), 9, 3)
        context.add(f"{name}_latency_ms", 1e3 * statistics.median(taken), spread(taken))
        profile_calls(context, name, draw)


def decoded(tokenizer: Any, f_hat_BChw: Tensor) -> Tensor:
    """As `mvar sample` decodes in bf16."""
    with torch.autocast(f_hat_BChw.device.type, torch.bfloat16, cache_enabled=False):
        pixels: Tensor = tokenizer.decode_latent(f_hat_BChw)
    return pixels


def sample(context: Context, depth: int, mamba: MambaBackend = "auto") -> None:
    """As `mvar sample` draws: our kernels, one CUDA graph from labels to pixels."""
    from mvar import MVAR
    from mvar.model.kernels import fused
    from mvar.model.kernels.arithmetic import Arithmetic
    from mvar.sampling.graph import GraphedDrawing
    from mvar.sampling.options import DEFAULTS

    on_gpu = context.device.type == "cuda"
    Arithmetic.of("bf16", "auto", context.device).apply()
    fused.switch(on_gpu)
    with context.device:
        model = MVAR(context.scale.depth(depth), mamba_backend=context.mixer(mamba), **context.scale.geometry)
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    model.store_matmuls_(torch.bfloat16).eval()

    def drawing(tokenizer: Any, images: int) -> Callable[[Tensor, range], Tensor]:
        return GraphedDrawing(
            model, tokenizer, images, lambda f_hat: decoded(tokenizer, f_hat), DEFAULTS, graphed=on_gpu
        )

    sampling(context, f"sample_d{depth}" + with_mixer(mamba), drawing)


def sample_var(context: Context, depth: int) -> None:
    from benchmarks.var import VAR, draw_latent

    torch.set_default_dtype(torch.bfloat16)
    with context.device:
        model = VAR(context.scale.depth(depth), **context.scale.geometry).eval()
    torch.set_default_dtype(torch.float32)

    def drawing(tokenizer: Any, _images: int) -> Callable[[Tensor, range], Tensor]:
        @torch.no_grad()
        def draw(labels_B: Tensor, seeds: range) -> Tensor:
            labels_B = labels_B.to(context.device)
            return decoded(tokenizer, draw_latent(model, tokenizer.quantizer, labels_B, seeds=seeds))

        return draw

    sampling(context, f"sample_var{depth}", drawing)


def tokenize(context: Context) -> None:
    """As `mvar tokenize` encodes: views as uint8 in host memory to codes in host memory."""
    import numpy as np

    from data_prep.encoder import BatchEncoder
    from data_prep.job import TokenizeConfig
    from mvar.images.arrays import from_uint8
    from mvar.tokenizer.files import save_tokenizer

    batch = context.scale.images(64)
    vqvae = tokenizer_of(context)
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (batch, 3, 9, 9), dtype=np.uint8)).float()
    side = vqvae.image_size
    soft = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255).byte()
    pixels_BHWC = soft.permute(0, 2, 3, 1).contiguous().numpy()
    with torch.no_grad():
        rows = vqvae.features(from_uint8(pixels_BHWC[:4]).to(context.device)).permute(0, 2, 3, 1).flatten(0, 2)
        words = rows[torch.randint(len(rows), (vqvae.vocab_size,), device=context.device)]
        scales = torch.logspace(-1.5, 0.5, len(words), device=context.device)
        vqvae.quantizer.embedding.weight.copy_(words * scales[:, None])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.safetensors"
        save_tokenizer(path, vqvae.cpu())
        codes = {}
        for precision in ("fp32", "bf16"):
            tree = {"source": folder, "store": folder, "tokenizer": str(path), "precision": precision, "batch": batch}
            encoder = BatchEncoder.load(TokenizeConfig.model_validate(tree))
            codes[precision] = encoder(pixels_BHWC)

            def several(encoder: BatchEncoder = encoder) -> None:
                for launched in [encoder.launch(pixels_BHWC) for _ in range(2)]:
                    launched.collect()

            taken = context.timed(several, 3, 1)
            context.add(f"tokenize_{precision}_imgs_per_s", 2 * batch / statistics.median(taken), spread(taken))
    context.add("tokenize_bf16_agreement", float((codes["bf16"] == codes["fp32"]).mean()))
