"""VAR (arXiv 2404.02905), the baseline without Mamba: attention over all coarser scales, with a key-value cache.

Written from the paper for benchmarks: as wide as M-VAR (64 x depth, heads = depth), conditioned layer norms with six
vectors a block, unit queries and keys with a temperature a head. Weights are random; nothing here loads a published
file. It is as fast as plain torch makes it: fused attention, conditioning computed once an image, and for the whole
pyramid no mask on a CPU, where every scale attends over its prefix (a third faster than a dense mask, forward and
backward).

Its linear layers are M-VAR's (`mvar.model.kernels.precision`): on a CPU without 16-bit matrix instructions they
multiply in float32, which is many times faster there than torch's own 16-bit products. Attention is in float32 on every
CPU, as M-VAR's is, because torch's 16-bit one is slower. So the comparison is one of algorithms.

Shapes: B images, L tokens of the scales at hand, P tokens of these and of coarser scales, C width, H heads, D head
width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.model.kernels.precision import Linear, no_autocast, wide
from mvar.sampling.logits import draw_codes, filter_logits
from mvar.sampling.uniforms import token_uniforms
from mvar.scales import PATCH_NUMS_256
from mvar.tokenizer.quantizer import Quantizer

NORM_EPS = 1e-6
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, H, L, D) out of q (B, H, L, D), k and v (B, H, P, D)."""


def attention_dtype(tensor: Tensor) -> torch.dtype:
    """In what attention runs fastest."""
    return tensor.dtype if tensor.is_cuda else wide(tensor.dtype)


def attend_by_scale(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, offsets: Sequence[int]) -> Tensor:
    """Block-causal attention of a whole pyramid without a mask: each scale over itself and all coarser ones."""
    parts = [
        F.scaled_dot_product_attention(q_BHLD[:, :, begin:end], k_BHLD[:, :, :end], v_BHLD[:, :, :end], scale=1.0)
        for begin, end in pairwise(offsets)
    ]
    return torch.cat(parts, dim=2)


class Cache:
    """Keys and values of all tokens so far, one buffer a block for the whole image; and each block's conditioning."""

    def __init__(self, blocks: int, images: int, heads: int, tokens: int, width: int, like: Tensor) -> None:
        shape = (blocks, 2, images, heads, tokens, width)
        self.buffer = torch.empty(shape, dtype=attention_dtype(like), device=like.device)
        self.filled = 0
        self.conditioning: dict[int, Tensor] = {}

    def extend(self, block: int, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of a scale; all so far (B, H, P, D)."""
        end = self.filled + k_BHLD.shape[2]
        self.buffer[block, 0, :, :, self.filled : end] = k_BHLD
        self.buffer[block, 1, :, :, self.filled : end] = v_BHLD
        return self.buffer[block, 0, :, :, :end], self.buffer[block, 1, :, :, :end]


class CausalAttention(nn.Module):
    """Each token sees its own scale and all coarser ones."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.log_scale_H11 = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))
        self.proj = Linear(width, width)

    def forward(self, x_BLC: Tensor, attend: Attend, cache: Cache | None, block: int) -> Tensor:
        qkv_3BHLD = self.qkv(x_BLC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        with no_autocast(x_BLC):
            q_BHLD, k_BHLD, v_BHLD = qkv_3BHLD.to(attention_dtype(qkv_3BHLD)).unbind(0)
            scale_H11 = self.log_scale_H11.clamp_max(math.log(100.0)).exp().to(q_BHLD.dtype)
            q_BHLD, k_BHLD = F.normalize(q_BHLD, dim=-1) * scale_H11, F.normalize(k_BHLD, dim=-1)
            if cache is not None:
                k_BHLD, v_BHLD = cache.extend(block, k_BHLD, v_BHLD)
            out_BHLD = attend(q_BHLD, k_BHLD, v_BHLD)
        out_BLC: Tensor = self.proj(out_BHLD.transpose(1, 2).flatten(2).to(qkv_3BHLD.dtype))
        return out_BLC


class VARBlock(nn.Module):
    """Attention and feed-forward layer, each conditioned by a gate, a scale and a shift."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.attention = CausalAttention(width, heads)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)
        self.conditioning = Linear(width, 6 * width)

    def forward(self, x_BLC: Tensor, cond_BC: Tensor, attend: Attend, cache: Cache | None, block: int) -> Tensor:
        known = {} if cache is None else cache.conditioning
        if block not in known:
            known[block] = self.conditioning(F.silu(cond_BC))
        vectors = known[block].unflatten(-1, (6, -1)).unsqueeze(1).unbind(2)
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = vectors
        h_BLC = torch.addcmul(shift_1, F.layer_norm(x_BLC, (self.width,), eps=NORM_EPS), 1 + scale_1)
        x_BLC = torch.addcmul(x_BLC, self.attention(h_BLC, attend, cache, block), gate_1)
        h_BLC = torch.addcmul(shift_2, F.layer_norm(x_BLC, (self.width,), eps=NORM_EPS), 1 + scale_2)
        return torch.addcmul(x_BLC, self.down(F.gelu(self.up(h_BLC), approximate="tanh")), gate_2)


class VAR(nn.Module):
    """The next-scale transformer. `width` and `heads` follow from `depth` unless given."""

    def __init__(
        self,
        depth: int = 16,
        num_classes: int = 1000,
        patch_nums: Sequence[int] = PATCH_NUMS_256,
        vocab_size: int = 4096,
        latent_channels: int = 32,
        *,
        width: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.width, self.heads = width or 64 * depth, heads or depth
        self.num_classes, self.vocab_size = num_classes, vocab_size
        self.lengths = [side * side for side in patch_nums]
        self.offsets = [0, *accumulate(self.lengths)]
        self.classes = nn.Embedding(num_classes + 1, self.width)
        self.words = Linear(latent_channels, self.width)
        self.levels = nn.Embedding(len(self.lengths), self.width)
        self.start_1LC = nn.Parameter(torch.randn(1, self.lengths[0], self.width) * 0.02)
        self.place_LC = nn.Parameter(torch.randn(self.offsets[-1], self.width) * 0.02)
        self.blocks = nn.ModuleList(VARBlock(self.width, self.heads) for _ in range(depth))
        self.last = Linear(self.width, 2 * self.width)
        self.head = Linear(self.width, vocab_size)
        levels = [level for level, length in enumerate(self.lengths) for _ in range(length)]
        self.register_buffer("level_L", torch.tensor(levels), persistent=False)
        self.level_L: Tensor

    def cache(self, images: int) -> Cache:
        head_width = self.width // self.heads
        return Cache(len(self.blocks), images, self.heads, self.offsets[-1], head_width, self.head.weight)

    def forward(self, labels_B: Tensor, x_BLC: Tensor | None, cache: Cache | None = None, scale: int = 0) -> Tensor:
        """Logits (B, L, V) of the whole pyramid, or with a cache of `scale`, which comes after those before it.

        `x_BLC`: the inputs of these tokens; the coarsest scale has none.
        """
        begin, end = (0, self.offsets[-1]) if cache is None else (self.offsets[scale], self.offsets[scale + 1])
        cond_BC = self.classes(labels_B)
        parts = [cond_BC.unsqueeze(1) + self.start_1LC] if begin == 0 else []
        if x_BLC is not None:
            parts.append(self.words(x_BLC.to(self.words.weight.dtype)))
        h_BLC = torch.cat(parts, dim=1) + (self.place_LC[begin:end] + self.levels(self.level_L[begin:end]))
        attend = self._attend(cached=cache is not None)
        for number, block in enumerate(self.blocks):
            h_BLC = block(h_BLC, cond_BC, attend, cache, number)
        if cache is not None:
            cache.filled = end
        scale_BC, shift_BC = self.last(F.silu(cond_BC)).chunk(2, dim=-1)
        h_BLC = F.layer_norm(h_BLC, (self.width,), eps=NORM_EPS)
        logits_BLV: Tensor = self.head(torch.addcmul(shift_BC.unsqueeze(1), h_BLC, 1 + scale_BC.unsqueeze(1)))
        return logits_BLV

    def _attend(self, cached: bool) -> Attend:
        if not cached and not self.level_L.is_cuda:
            return partial(attend_by_scale, offsets=self.offsets)
        mask_LL = None if cached else self.level_L.unsqueeze(1) >= self.level_L
        return partial(F.scaled_dot_product_attention, attn_mask=mask_LL, scale=1.0)


@torch.no_grad()
def draw_latent(
    model: VAR,
    quantizer: Quantizer,
    labels_B: Tensor,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seeds: Iterable[int] = (),
) -> Tensor:
    """Feature maps (B, C, h, w), drawn as `mvar.sampling` draws them: same guidance, filters, numbers and quantizer."""
    seeds_B = torch.tensor(list(seeds), dtype=torch.int64, device=labels_B.device)
    doubled_B = torch.cat((labels_B, torch.full_like(labels_B, model.num_classes)))
    cache, f_hat_BChw = model.cache(len(doubled_B)), quantizer.start(len(labels_B), labels_B.device)
    inputs_BLC: Tensor | None = None
    for scale, _ in enumerate(model.lengths):
        x_BLC = None if inputs_BLC is None else inputs_BLC.repeat(2, 1, 1)
        with_class_BLV, without_BLV = model(doubled_B, x_BLC, cache, scale).float().chunk(2)
        strength = cfg * scale / max(len(model.lengths) - 1, 1)
        logits_BLV = filter_logits((1 + strength) * with_class_BLV - strength * without_BLV, top_k, top_p)
        codes_BL = draw_codes(logits_BLV, token_uniforms(seeds_B, scale, logits_BLV.shape[1]))
        f_hat_BChw, inputs_BLC = quantizer.add_scale(f_hat_BChw, codes_BL, scale)
    return f_hat_BChw
