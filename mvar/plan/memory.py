"""Bytes that a rank holds, by category: what DeepSpeed 0.19 really allocates, found by measuring and reading it.

P parameters on N ranks; e bytes of a weight: 2 in bf16 and fp16, else 4. Masters and AdamW's moments are fp32.

| stage | weights | gradients          | optimizer |                                                          |
|-------|---------|--------------------|-----------|----------------------------------------------------------|
| 0     | 4 P     | 4 P                | 8 P       | the weights are their own masters; no bf16, no fp16      |
| 1     | e P     | bf16 6 P, else 4 P | 12 P/N    | bf16: the gradients and their fp32 sums                  |
| 2     | e P     | 4 P/N              | 12 P/N    |                                                          |
| 3     | e P/N   | 4 P/N; e P/N alone | 12 P/N    | small parameters are also kept whole                     |

alone: a step of one micro-batch.

Stage 1 with e = 4 and without accumulation holds 4 P/N of gradients, and those across the border of ranks whole.

Shapes are those of the model: B images, L tokens, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

from mvar.config import ActivationCheckpointing, Precision
from mvar.model.kernels.ssd import chunk_length
from mvar.model.mamba2 import EXPAND, HEAD_WIDTH, STATE
from mvar.model.recompute import recomputes
from mvar.model.token_loss import CHUNK
from mvar.plan.sizes import Sizes

Kernels = Literal["cpu", "gpu", "gpu_torch"]
"""`gpu`: attention over packed sequences, mamba-ssm, fused chains. `gpu_torch`: torch's fused attention, our scan, no
fused chains. `cpu`: as `gpu_torch`, and attention runs in fp32."""

FP32, FP64 = 4, 8
ALIGNED_TO = 2
"""ZeRO 1 and 2 pad each optimizer group to a multiple of so many elements for each rank."""
DEFAULT_BUCKET = 500_000_000
DEFAULT_LIVE = 1_000_000_000
DEFAULT_PERSISTENT = 100_000
DEFAULT_PREFETCH = 50_000_000


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as memory and messages go."""

    stage: int
    precision: Precision
    world: int
    zero: dict[str, Any] = field(default_factory=dict)
    """The template's section "zero_optimization"."""
    ema: bool = False
    recompute: ActivationCheckpointing = "off"
    kernels: Kernels = "gpu"
    accumulation: int = 1

    @property
    def weight_bytes(self) -> int:
        """Of a weight that the model computes with."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def compute_bytes(self) -> int:
        """Of an activation in the blocks' matmuls."""
        return 4 if self.precision == "fp32" else 2

    def device_of(self, section: Literal["offload_optimizer", "offload_param"]) -> str:
        """`none`, `cpu` or `nvme`."""
        return str((self.zero.get(section) or {}).get("device") or "none")

    def number(self, key: str, default: int) -> int:
        value = self.zero.get(key, default)
        return default if value == "auto" else int(value)


@dataclass(frozen=True)
class ModelStateBytes:
    """Model state of the rank that holds most, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    """Master weights and both moments; where these are offloaded, the update's gradients too."""
    ema: int
    host: int
    """Of all these together, what lies in host memory."""
    disk: int
    """On disk instead (NVMe)."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def device(self) -> int:
        """What lies on the GPU."""
        return self.total - self.host - self.disk


def model_state(sizes: Sizes, setup: Setup) -> ModelStateBytes:
    """What training keeps from the last backward pass of a step to its update."""
    e, groups = setup.weight_bytes, sizes.groups
    if setup.stage == 0:
        whole = FP32 * sizes.parameters
        return ModelStateBytes(whole, whole, 2 * whole, whole * setup.ema, 0, 0)
    if setup.stage == 3:
        share = sum(-(-count // setup.world) for group in groups for count in group)
        kept = sum(count for group in groups for count in group if count <= _persistent(setup))
        gradients = (e if setup.accumulation == 1 else FP32) * share
        return _offloaded(setup, e * share, e * kept, gradients, FP32 * share, FP32 * share * setup.ema)
    padded = [-(-sum(group) // (ALIGNED_TO * setup.world)) * ALIGNED_TO * setup.world for group in groups]
    share = sum(padded) // setup.world
    gradients = FP32 * share
    if setup.stage == 1:
        gradients = (6 if setup.precision == "bf16" else FP32) * sizes.parameters
    if setup.weight_bytes == FP32 and not _flat(setup) and (setup.stage == 2 or setup.accumulation == 1):
        gradients = FP32 * _whole_in_part(groups, padded, setup.world)
    return _offloaded(setup, 0, e * sum(padded), gradients, FP32 * share, FP32 * share * setup.ema)


def _flat(setup: Setup) -> bool:
    """Whether gradients lie where the optimizer reads them (`mvar.training.zero_gradients`)."""
    return setup.stage == 2 and setup.device_of("offload_optimizer") == "none"


def _persistent(setup: Setup) -> int:
    """ZeRO 3 keeps parameters of at most so many elements whole on every rank."""
    return setup.number("stage3_param_persistence_threshold", DEFAULT_PERSISTENT) if setup.world > 1 else 0


def _whole_in_part(groups: tuple[list[int], list[int]], padded: list[int], world: int) -> int:
    """Elements of all parameters that lie at least partly in a rank's share, for the rank with most."""
    held = [0] * world
    for group, total in zip(groups, padded, strict=True):
        width = total // world
        for end, count in zip(accumulate(group), group, strict=True):
            for rank in range((end - count) // width, min((end - 1) // width, world - 1) + 1):
                held[rank] += count
    return max(held)


def _offloaded(setup: Setup, parted: int, whole: int, gradients: int, master: int, ema: int) -> ModelStateBytes:
    """Where it all lies. `parted`, `whole`: bytes of divided and of undivided weights; `master`: of master weights."""
    optimizer, parameters = setup.device_of("offload_optimizer"), setup.device_of("offload_param")
    host = disk = 0
    # Off the GPU, the update has its gradients in fp32 beside the master weights.
    kept = (3 if optimizer == "none" else 4) * master
    if optimizer == "cpu":
        host += kept + gradients + ema
    elif optimizer == "nvme":
        host += gradients
        disk += kept
    if parameters == "cpu":
        host += parted
    elif parameters == "nvme":
        disk += parted
    return ModelStateBytes(parted + whole, gradients, kept, ema, host, disk)


@dataclass(frozen=True)
class Buffers:
    """What comes and goes around the model state, in bytes at most."""

    communication: int
    """Buckets of gradients on their way."""
    gathered: int
    """ZeRO 3: weights of other ranks, gathered for use."""
    casts: int
    """bf16_autocast: the weights in bf16, kept until the backward pass."""
    update: int
    """ZeRO 1, and 2 off the GPU: a flat copy of a group's gradients while the optimizer runs, when activations are
    gone."""

    @property
    def in_pass(self) -> int:
        return self.communication + self.gathered + self.casts


def buffers(sizes: Sizes, setup: Setup) -> Buffers:
    """Beyond model state and activations. Buckets larger than the model are as large as DeepSpeed makes them."""
    bucket = setup.number("reduce_bucket_size", DEFAULT_BUCKET)
    element = setup.weight_bytes
    communication = gathered = update = 0
    if setup.stage in (1, 2):
        if setup.stage == 1 and setup.precision == "bf16":
            communication = min(bucket, sizes.parameters) * element
        else:
            communication = (2 if setup.zero.get("overlap_comm") else 1) * bucket * element
        update = 0 if _flat(setup) else FP32 * max(sum(group) for group in sizes.groups) // setup.world
    elif setup.stage == 3:
        largest = max(sizes.counts.values())
        # The bucket, and a copy of it in the order that reduce-scatter wants. A larger gradient goes alone.
        communication = bucket * element + max(min(bucket, sizes.parameters), largest) * element
        live = setup.number("stage3_max_live_parameters", DEFAULT_LIVE)
        ahead = setup.number("stage3_prefetch_bucket_size", DEFAULT_PREFETCH)
        gathered = min(sizes.parameters, max(live, largest) + ahead) * element if setup.world > 1 else 0
    else:
        communication = min(bucket, sizes.parameters) * element
    return Buffers(communication, gathered, 2 * _casts(sizes, setup), update)


CAST_LAYERS = ("mat_qkv.", "attn.proj.", "fc1.", "fc2.", "in_proj.", "out_proj.", "ada_lin.")
"""Linear layers that autocast runs in bf16, with a copy of their weights."""


def _casts(sizes: Sizes, setup: Setup, *, saved_only: bool = False) -> int:
    """Elements that autocast turns into bf16. `saved_only`: without blocks that are recomputed, whose copies last only
    until the forward pass ends."""
    if setup.precision != "bf16_autocast":
        return 0
    linear = {name: count for name, count in sizes.counts.items() if any(part in name for part in CAST_LAYERS)}
    if not saved_only:
        return sum(linear.values())
    again = {f"blocks.{index}." for index in range(sizes.model.depth) if recomputes(setup.recompute, index)}
    return sum(count for name, count in linear.items() if not name.startswith(tuple(again)))


@dataclass(frozen=True)
class Activations:
    """What a forward pass of one micro-batch keeps for the backward pass, in bytes."""

    blocks: int
    """Kept from the forward pass on."""
    recomputed: int
    """Of the one block that is being recomputed."""
    ends: int
    """Embeddings and the norm before the head."""
    logits: int
    """fp32 logits, their log-softmax and its gradient, of the tokens that are worked on together."""
    working: int
    """Gradients of activations inside the block that the backward pass is at."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def block_per_token(sizes: Sizes, setup: Setup) -> dict[str, float]:
    """Bytes that a block keeps for each token, by what keeps them. W: fp32 activations, h: the matmuls'."""
    C, heads, h, W = sizes.width, sizes.model.resolved_heads, setup.compute_bytes, FP32
    inner = EXPAND * C
    mamba_heads, conv = inner // HEAD_WIDTH, inner + 2 * STATE
    projected = inner + conv + mamba_heads
    attend = W if setup.kernels == "cpu" else h
    l2 = sizes.model.attn_l2_norm
    # Scales of one token skip the attention kernel.
    alone = sum(length for length in sizes.lengths if length == 1) / sizes.tokens
    fused = setup.kernels == "gpu"
    kept: dict[str, float] = {
        # Input, output; mean and deviation. In one kernel the normalised input is found again from these.
        "norms": 3 * (W * C + h * C + 2 * W) + (0 if fused else 3 * W * C),
        "residuals": 3 * C * (h if fused else W),  # the branches' outputs, which the gates multiply
        "attention: output": h * C,
        "feed-forward": 2 * 4 * h * C,  # before and after GELU
        "mamba: projection": h * projected,
    }
    if l2:
        kept["attention: qkv"] = 3 * h * C
        kept["attention: unit vectors"] = 2 * attend * C + 6 * W * heads
        kept["attention: values in fp32"] = attend * C if attend != h else 0
    else:
        kept["attention: qkv"] = 3 * attend * C
    kept["attention: softmax statistics"] = W * heads * (1 - alone)
    if setup.kernels != "gpu":
        kept["attention: output of each scale"] = attend * C * (1 - alone)
    if setup.kernels == "gpu":
        kept["mamba: scan"] = 2 * h * inner + W  # before and after the gated norm
    else:
        chunk = chunk_length(sizes.tokens)
        states = STATE * inner / chunk if chunk < sizes.tokens else 0
        kept["mamba: scan"] = h * (conv + 2 * inner + states) + 2 * W * mamba_heads
    return kept


def matmuls_per_token(sizes: Sizes, setup: Setup) -> float:
    """Bytes of the results of matmuls and attention, all that selective recomputation keeps of a block, a token."""
    C, h = sizes.width, setup.compute_bytes
    inner = EXPAND * C
    projected = 2 * inner + 2 * STATE + inner // HEAD_WIDTH
    attend = FP32 if setup.kernels == "cpu" else h
    # Those inside our scan are not kept: it is one operation to autograd.
    return h * (3 * C + C + projected + C + 4 * C + C) + attend * C + FP32 * sizes.model.resolved_heads


def activations(sizes: Sizes, setup: Setup, micro_batch: int) -> Activations:
    """Of `micro_batch` images through the whole model."""
    tokens = micro_batch * sizes.tokens
    C, W, depth = sizes.width, FP32, sizes.model.depth
    per_block = int(tokens * sum(block_per_token(sizes, setup).values())) + _conditioning(sizes, setup, micro_batch)
    again = sum(recomputes(setup.recompute, index) for index in range(depth))
    between: float = W * C
    if setup.recompute == "selective":
        between += matmuls_per_token(sizes, setup)
    ends = tokens * W * (3 * C + sizes.model.latent_channels) + 4 * W * micro_batch * C
    return Activations(
        blocks=(depth - again) * per_block + again * int(tokens * between),
        recomputed=per_block if again else 0,
        ends=ends,
        logits=3 * W * min(tokens, CHUNK) * sizes.model.vocab_size,
        working=tokens * C * (2 * 4 * setup.compute_bytes + 2 * W),
    )


def saved_for_backward(sizes: Sizes, setup: Setup, micro_batch: int) -> int:
    """What autograd holds at the end of the forward pass, beyond the parameters themselves."""
    found = activations(sizes, setup, micro_batch)
    kept_logits = found.logits // 3 if micro_batch * sizes.tokens <= CHUNK else 0
    return found.blocks + found.ends + kept_logits + 2 * _casts(sizes, setup, saved_only=True)


def _conditioning(sizes: Sizes, setup: Setup, images: int) -> int:
    """A block's nine vectors and what made them: once for each image."""
    C, h, W = sizes.width, setup.compute_bytes, FP32
    vectors = 9 * W * C + 3 * W * C + 3 * W * C  # vectors, 1 + scale, gates times drop path
    return images * (vectors + (h * C * 2 + (h * 9 * C if h != W else 0)))


@dataclass(frozen=True)
class Memory:
    """All of it for one micro-batch size."""

    micro_batch: int
    state: ModelStateBytes
    buffers: Buffers
    activations: Activations

    @property
    def peak(self) -> int:
        """Most bytes on the GPU: in the backward pass, or while the optimizer runs."""
        return self.state.device + max(self.buffers.in_pass + self.activations.total, self.buffers.update)

    def categories(self) -> dict[str, int]:
        """Bytes on the GPU in the backward pass."""
        state = self.state
        parts = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer + state.ema}
        off = state.host + state.disk
        if off:  # In the order in which they are moved away.
            for name in ("optimizer", "gradients", "weights"):
                moved = min(off, parts[name])
                parts[name] -= moved
                off -= moved
        act = self.activations
        return parts | {
            "activations": act.blocks + act.recomputed + act.ends + act.working,
            "logits": act.logits,
            "communication": self.buffers.communication,
            "gathered": self.buffers.gathered + self.buffers.casts,
        }


def memory(sizes: Sizes, setup: Setup, micro_batch: int) -> Memory:
    return Memory(micro_batch, model_state(sizes, setup), buffers(sizes, setup), activations(sizes, setup, micro_batch))


def largest_micro_batch(sizes: Sizes, setup: Setup, share: int, limit: int) -> int | None:
    """The largest divisor of a rank's `share` of images whose peak stays within `limit` bytes; None if none does."""
    for size in range(share, 0, -1):
        if share % size == 0:
            split = replace(setup, accumulation=share // size)
            if memory(sizes, split, size).peak <= limit:
                return size
    return None


def checkpoint_bytes(sizes: Sizes, *, ema: bool) -> int:
    """A checkpoint: fp32 weights, two moments, perhaps the average."""
    return FP32 * (3 + ema) * sizes.parameters
