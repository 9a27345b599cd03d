"""M-VAR (arXiv 2411.10433), the next-scale transformer: one forward path for training, evaluation and sampling.

Shapes: B batch, L tokens of the scales at hand, C width, V vocabulary, S scales, D depth, G branches of a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvar.config import ActivationCheckpointing, AttentionBackend, MambaBackend, ModelConfig, NormBackend
from mvar.errors import ConfigError
from mvar.model.attention import ScaleAttention
from mvar.model.block import VECTORS, Block, BlockState
from mvar.model.conditioning import ConditionedNorm, project, projection
from mvar.model.kernels.precision import Linear, WideEmbedding, WideLinear, compute_dtype
from mvar.model.mamba2 import HEAD_WIDTH
from mvar.model.recompute import keeping_linears, recomputes
from mvar.model.token_loss import token_losses
from mvar.pretrained import Pretrained
from mvar.scales import PATCH_NUMS_256, ScalePyramid


@dataclass
class DecodeState:
    """What the model remembers between scales, block by block: Mamba's state and the conditioning."""

    blocks: list[BlockState] = field(default_factory=list)
    next_scale: int = 0

    def keep_first(self, count: int) -> None:
        """Forget all but the first `count` images of the batch."""
        for block in self.blocks:
            block.keep_first(count)


def drop_path_rates(depth: int, last: float) -> list[float]:
    """Probability that a block's branches are dropped, rising linearly from 0 to `last`."""
    return [last * block / max(depth - 1, 1) for block in range(depth)]


class MVAR(nn.Module, Pretrained):
    """The transformer over a pyramid of token maps.

    `width` defaults to 64 x depth and `heads` to depth. `activation_checkpointing`: "off", "every" block is recomputed
    in the backward pass, or every n-th; "selective" keeps what its linear layers gave and recomputes the rest. A
    fresh model has torch's default initialisation; see `mvar.model.init`. Raises ConfigError for an impossible geometry
    and BackendError for kernels that are asked for and missing.
    """

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
        attn_l2_norm: bool = True,
        shared_conditioning: bool = False,
        attention_backend: AttentionBackend = "auto",
        mamba_backend: MambaBackend = "auto",
        norm_backend: NormBackend = "torch",
        activation_checkpointing: ActivationCheckpointing = "off",
    ) -> None:
        super().__init__()
        width = 64 * depth if width is None else width
        heads = depth if heads is None else heads
        if depth < 1 or heads < 1 or width < 1 or width % heads or width % (HEAD_WIDTH // 2):
            raise ConfigError(
                f"model: depth {depth}, width {width}, heads {heads}: width must be a multiple of heads and of "
                f"{HEAD_WIDTH // 2} (half of a Mamba-2 head), and all positive."
            )
        self.depth, self.width, self.heads = depth, width, heads
        self.num_classes, self.vocab_size, self.latent_channels = num_classes, vocab_size, latent_channels
        self.attn_l2_norm, self.shared_conditioning = attn_l2_norm, shared_conditioning
        self.pyramid = ScalePyramid(tuple(patch_nums))
        self.activation_checkpointing = activation_checkpointing

        self.pos_start = nn.Parameter(torch.zeros(1, self.pyramid.lengths[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, self.pyramid.total, width))
        self.word_embed = WideLinear(latent_channels, width)
        self.class_emb = WideEmbedding(num_classes + 1, width)
        self.lvl_embed = WideEmbedding(self.pyramid.num_scales, width)
        if shared_conditioning:
            self.shared_ada_lin = projection(width, VECTORS)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                l2_norm=attn_l2_norm,
                shared_conditioning=shared_conditioning,
                attention_backend=attention_backend,
                mamba_backend=mamba_backend,
                norm_backend=norm_backend,
            )
            for _ in range(depth)
        )
        self.head_nm = ConditionedNorm(width, norm_backend)
        self.head = WideLinear(width, vocab_size)
        self.register_load_state_dict_pre_hook(_drop_published_buffers)  # type: ignore[no-untyped-call]

    @classmethod
    def from_config(
        cls, config: ModelConfig, *, num_classes: int, activation_checkpointing: ActivationCheckpointing = "off"
    ) -> MVAR:
        """The model that a configuration describes, for `num_classes` labels."""
        arguments = inspect.signature(cls).parameters.keys() & set(ModelConfig.model_fields)
        settings: dict[str, Any] = {name: getattr(config, name) for name in arguments} | {"num_classes": num_classes}
        return cls(**settings, activation_checkpointing=activation_checkpointing)

    def forward(
        self,
        labels_B: Tensor,
        x_BLC: Tensor | None,
        *,
        drop_path_DGB: Tensor | None = None,
        state: DecodeState | None = None,
        scales: range | None = None,
        codes_BL: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Any:
        """Logits (B, L, V), wide, of every token of `scales`; with `codes_BL`, the right words, their losses instead.

        `labels_B`: int64 classes; num_classes stands for "no class". `x_BLC`: (B, L, latent_channels) inputs of the
        tokens of `scales`, where the coarsest scale has none (None will do when it is alone). `drop_path_DGB`: (depth,
        3, B) multipliers of the residual branches. Without `state`, `scales` is the whole pyramid. With a fresh
        DecodeState the scales may be given a few at a time, in order, with the same labels; each call leaves the state
        for the next. Losses: the fields of `TokenLosses`, each (B, L), computed without all logits at once.
        """
        features_BLC = self.features(labels_B, x_BLC, drop_path_DGB=drop_path_DGB, state=state, scales=scales)
        if codes_BL is not None:
            return token_losses(self.head, features_BLC, codes_BL, label_smoothing)
        return self.head(features_BLC)

    def features(
        self,
        labels_B: Tensor,
        x_BLC: Tensor | None,
        *,
        drop_path_DGB: Tensor | None = None,
        state: DecodeState | None = None,
        scales: range | None = None,
    ) -> Tensor:
        """What `forward` feeds to the head: (B, L, C), wide. For ZeRO-3, call it inside a module's forward only."""
        scales = self._check_scales(scales, state)
        cond_BC = self.class_emb(labels_B)
        h_BLC = self._embed(cond_BC, x_BLC, scales)
        # Read off a parameter of this very module: under ZeRO-3, touching a child's weight would gather it too early.
        dtype = compute_dtype(self.pos_start)
        shared = project(self.shared_ada_lin, cond_BC, VECTORS, dtype) if self.shared_conditioning else cond_BC
        lengths = self.pyramid.lengths[scales.start : scales.stop]
        for index, block in enumerate(self.blocks):
            drop = None if drop_path_DGB is None else drop_path_DGB[index]
            memory = None if state is None else state.blocks[index]
            if memory is None and self._recomputes(index):
                # The model draws nothing at random, so there is no generator state to preserve.
                how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                if self.activation_checkpointing == "selective":
                    how["context_fn"] = keeping_linears
                h_BLC = checkpoint(block, h_BLC, shared, lengths, dtype, drop, **how)
            else:
                h_BLC = block(h_BLC, shared, lengths, dtype, drop, memory)
        if state is not None:
            state.next_scale = scales.stop
        features_BLC: Tensor = self.head_nm(h_BLC, cond_BC, dtype)
        return features_BLC

    @torch.no_grad()
    def store_matmuls_(self, dtype: torch.dtype) -> MVAR:
        """Keep the weights of the big matmuls in `dtype`, for inference: half the memory and no cast at every use.

        What is computed wide (embeddings, head, decays, norms) keeps its precision.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.to(dtype)
            if isinstance(module, ScaleAttention):
                module.q_bias.data, module.v_bias.data = module.q_bias.to(dtype), module.v_bias.to(dtype)
        self.pos_start.data = self.pos_start.to(dtype)  # the compute dtype is read off it
        return self

    def _check_scales(self, scales: range | None, state: DecodeState | None) -> range:
        first = 0 if state is None else state.next_scale
        last = self.pyramid.num_scales
        scales = range(first, last) if scales is None else scales
        if scales.start != first or not first < scales.stop <= last or scales.step != 1:
            raise ValueError(f"scales: got {scales}, expected a range that begins at {first} and ends by {last}")
        if state is not None and not state.blocks:
            state.blocks = [BlockState() for _ in self.blocks]
        return scales

    def _embed(self, cond_BC: Tensor, x_BLC: Tensor | None, scales: range) -> Tensor:
        """The class at the coarsest scale, the coarser scales' codes elsewhere; plus position and level."""
        lengths, offsets = self.pyramid.lengths, self.pyramid.offsets
        parts = []
        if scales.start == 0:
            parts.append(cond_BC.unsqueeze(1) + self.pos_start.to(cond_BC.dtype))
        if scales.stop > max(scales.start, 1):
            expected = offsets[scales.stop] - offsets[max(scales.start, 1)]
            if x_BLC is None or x_BLC.shape[1:] != (expected, self.latent_channels):
                got = "none" if x_BLC is None else tuple(x_BLC.shape)
                raise ValueError(f"x_BLC: got {got}, expected (B, {expected}, {self.latent_channels}) for {scales}")
            parts.append(self.word_embed(x_BLC))
        levels_SC = self.lvl_embed(torch.arange(scales.start, scales.stop, device=cond_BC.device))
        level_LC = torch.cat([levels_SC[i].expand(lengths[s], -1) for i, s in enumerate(scales)])
        place_LC = self.pos_1LC[0, offsets[scales.start] : offsets[scales.stop]].to(cond_BC.dtype)
        return torch.cat(parts, dim=1) + (level_LC + place_LC)

    def _recomputes(self, index: int) -> bool:
        return torch.is_grad_enabled() and recomputes(self.activation_checkpointing, index)


PUBLISHED_BUFFERS = ("attn_bias_for_masking", "lvl_1L", "attn.zero_k_bias", "attn.patch_nums")
"""Constants that published files store among the weights."""


def _drop_published_buffers(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and key.endswith(PUBLISHED_BUFFERS)]:
        del state[key]
