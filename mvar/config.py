"""What `mvar train` can be told: every key with its type, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mvar.scales import PATCH_NUMS_256, ScalePyramid
from mvar.settings import Fraction, PathOrUrl, Section

AttentionBackend = Literal["auto", "sdpa", "varlen", "flash", "triton"]
MambaBackend = Literal["auto", "torch", "mamba_ssm", "triton"]
NormBackend = Literal["torch", "apex"]
ActivationCheckpointing = Literal["off", "every", "selective"] | PositiveInt
InitRecipe = Literal["fixed", "published"]
Precision = Literal["bf16", "bf16_autocast", "fp16", "fp32"]
Switch = Literal["auto", "on", "off"]
ReaderKind = Literal["mmap", "ram", "staged"]
PeakSetting = Literal["auto", "measure"] | PositiveFloat
DeviceChoice = Literal["auto", "cpu", "cuda"]
WandbMode = Literal["offline", "online", "disabled"]
Phase = Literal["start", "step", "validate", "save"]
"""What a training is busy with, as far as its watchdog cares."""


class ModelConfig(Section):
    """The transformer (DESIGN §5). The defaults are the published 256 px model."""

    depth: PositiveInt = Field(16, description="blocks; width and heads follow from it")
    width: PositiveInt | None = Field(None, description="channels; default 64 x depth")
    heads: PositiveInt | None = Field(None, description="attention heads; default depth")
    num_classes: PositiveInt | None = Field(None, description="labels; default: as many as the code store has")
    patch_nums: tuple[PositiveInt, ...] = Field(PATCH_NUMS_256, description="side of each token map, coarse to fine")
    vocab_size: PositiveInt = Field(4096, description="words of the tokenizer's codebook")
    latent_channels: PositiveInt = Field(32, description="channels of a codebook word")
    attn_l2_norm: bool = Field(True, description="L2-normalise q and k (published d16 and d20: false)")
    shared_conditioning: bool = Field(False, description="one class conditioning for all blocks (d36-s)")
    label_drop: Fraction = Field(0.1, description="share of labels replaced by 'no class', for guidance")
    drop_path: Fraction | None = Field(None, description="stochastic depth of the last block; default 0.1 x depth/24")
    init: InitRecipe = Field("fixed", description="'published' repeats its two omissions")
    init_gamma: NonNegativeFloat = Field(1e-3, description="scale of the residual gates at the start")
    init_head: NonNegativeFloat = Field(0.02, description="scale of the head's weight at the start")
    init_conditioning: NonNegativeFloat = Field(0.5, description="scale of the conditioning's weight at the start")
    attention_backend: AttentionBackend = Field(
        "auto", description="kernels of the attention: torch's, torch's for packed sequences, flash-attn's, or our own"
    )
    mamba_backend: MambaBackend = Field("auto", description="kernels of Mamba-2")
    norm_backend: NormBackend = Field("torch", description="layer norms: torch's, or NVIDIA apex's fused one")

    @model_validator(mode="after")
    def _geometry(self) -> ModelConfig:
        ScalePyramid(self.patch_nums)
        width, heads = self.resolved_width, self.resolved_heads
        if width % heads or width % 32:
            raise ValueError(f"width {width} must be a multiple of heads ({heads}) and of 32 (Mamba-2's heads)")
        return self

    @property
    def resolved_width(self) -> int:
        return self.width or 64 * self.depth

    @property
    def resolved_heads(self) -> int:
        return self.heads or self.depth

    @property
    def resolved_drop_path(self) -> float:
        return 0.1 * self.depth / 24 if self.drop_path is None else self.drop_path


class DataConfig(Section):
    """The code store that is trained on."""

    store: PathOrUrl = Field(description="folder of the code store (the one that holds manifest.json), or its URL")
    tokenizer: Path | None = Field(None, description="tokenizer file, to draw sample grids while training")
    reader: ReaderKind = Field(
        "mmap",
        description="map the shards, load them first (once a machine), or copy them to the node's disk and map these",
    )
    stage: Path | None = Field(None, description="folder on the node's own disk, for reader=staged")


class OptimConfig(Section):
    """AdamW and its schedule (published recipe)."""

    base_lr: PositiveFloat = Field(1e-4, description="learning rate per 256 images of global batch")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="Adam's moment decays")
    eps: PositiveFloat = Field(1e-8, description="Adam's epsilon")
    weight_decay: NonNegativeFloat = Field(0.05, description="decay of matrices at the start")
    weight_decay_end: NonNegativeFloat | None = Field(None, description="decay at the end; default: the same")
    clip_grad: NonNegativeFloat = Field(2.0, description="global gradient norm limit; 0: off")
    schedule: Annotated[str, Field(pattern=r"^(lin0|lin00|lin|cos|exp|lin0\.\d+)$")] = Field(
        "lin0", description="learning rate after warm-up: lin0, lin00, lin, cos, exp, or lin0.N"
    )
    warmup_epochs: NonNegativeFloat | None = Field(None, description="default: epochs / 50")
    warmup_start: Fraction = Field(0.005, description="first learning rate, as a share of the peak")
    final_lr: Fraction = Field(0.1, description="last learning rate, as a share of the peak")
    progressive: Fraction = Field(
        0.0, description="share of the run by which all scales are learned, the finer ones later; 0: all from the start"
    )
    progressive_scales: PositiveInt = Field(5, description="with progressive: scales learned from the start")
    progressive_warmup_epochs: NonNegativeFloat = Field(
        0.0, description="with progressive: a new scale's loss grows to its full weight over so many epochs"
    )
    label_smoothing: Fraction = Field(0.0, description="share of each target spread over all words; published: 0")
    ema_decay: Fraction = Field(0.0, description="moving average of the weights, such as 0.9999; 0: none is kept")
    ema_warmup: bool = Field(
        True, description="with ema_decay: after n updates the average's decay is (1 + n) / (10 + n) at most"
    )
    impl: Literal["auto", "torch", "deepspeed_cpu", "deepspeed_fused", "apex"] = Field(
        "auto", description="who runs AdamW: torch fused, DeepSpeed, or NVIDIA apex"
    )


class EngineConfig(Section):
    """DeepSpeed and memory."""

    ds_config: Path = Field(Path("ds_configs/zero2.json"), description="DeepSpeed template; picks the ZeRO stage")
    precision: Precision = Field("bf16", description="arithmetic of the blocks")
    micro_batch: PositiveInt | None = Field(None, description="images a rank holds at once; default: global/world")
    activation_checkpointing: ActivationCheckpointing = Field(
        "off", description="recompute in the backward pass: every block, every n-th, or all but linear layers"
    )
    tf32: Switch = Field("auto", description="fp32 products on GPUs with 10 bits of each factor; auto: in 16-bit runs")
    compile: Switch = Field(
        "auto", description="torch.compile of what is between matrix products; auto: on GPUs, on CPUs for large models"
    )
    deterministic: bool = Field(False, description="on GPUs too, two runs give the same bits; slower")
    threads: PositiveInt | None = Field(None, description="CPU threads a rank uses; default: cores / local ranks")
    offload_folder: Path | None = Field(None, description="folder on a fast local disk, for templates that use NVMe")
    max_bad_steps: PositiveInt = Field(
        10, description="bad steps in a row (loss or gradient not finite, or a spike) before the run goes back"
    )
    max_rollbacks: NonNegativeInt = Field(
        1, description="times a start may go back to the last good checkpoint and skip the data after it"
    )
    spike_sigmas: NonNegativeFloat = Field(
        20, description="a loss or gradient norm so many deviations above the median is a spike; 0: never"
    )
    watchdog_s: NonNegativeFloat = Field(
        1800, description="end with stacks in the log after so long without progress, seconds; 0: never"
    )
    watchdog_start_s: NonNegativeFloat | None = Field(
        None, description="the same at the start, counted from the last headway of any rank; default: watchdog_s"
    )
    watchdog_step_s: NonNegativeFloat | None = Field(None, description="the same in a step; default: watchdog_s")
    watchdog_validate_s: NonNegativeFloat | None = Field(
        None, description="the same between two batches of a validation or of samples; default: watchdog_s"
    )
    watchdog_save_s: NonNegativeFloat | None = Field(None, description="the same in a save; default: watchdog_s")

    def limits_s(self) -> dict[Phase, float]:
        """How long each phase of a training may go without progress; 0: for ever."""
        given: dict[Phase, float | None] = {
            "start": self.watchdog_start_s,
            "step": self.watchdog_step_s,
            "validate": self.watchdog_validate_s,
            "save": self.watchdog_save_s,
        }
        return {phase: self.watchdog_s if limit is None else limit for phase, limit in given.items()}


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: PositiveInt = Field(1000, description="save after so many steps")
    background: Literal["auto", "off"] = Field(
        "auto", description="write while training goes on; auto: if host memory has room for two copies of a snapshot"
    )
    on_failure: Literal["stop", "go_on"] = Field(
        "stop", description="when a save fails (disk full): end, or warn and go on to the next one"
    )
    keep_last: PositiveInt = Field(3, description="newest checkpoints kept")
    keep_every: NonNegativeInt = Field(0, description="keep those of every so many steps for good; 0: none")
    keep_best: bool = Field(False, description="keep the one with the lowest validation loss (of those validated)")
    trust_sizes: bool = Field(False, description="verify sizes only, not digests, when resuming")
    stop_before_end_s: NonNegativeFloat = Field(180, description="save and stop so long before Slurm's time limit")
    takeover_s: PositiveFloat = Field(
        90, description="a run whose process on another host gave no sign of life for so long is taken over"
    )


class TrustConfig(Section):
    """What is asked of the machines while they train (docs/resume.md)."""

    verify_every: NonNegativeInt = Field(
        0, description="steps between two micro-batches that every rank computes twice, to compare the bits; 0: none"
    )
    slow_factor: NonNegativeFloat = Field(
        1.3,
        description="a rank whose forward passes take so many times the median rank's counts against its node; 0: off",
    )
    slow_steps: PositiveInt = Field(100, description="steps over which that is judged")


class TrackingConfig(Section):
    """Where measurements go. metrics.jsonl is always written."""

    log_every: PositiveInt = Field(10, description="steps between two status lines")
    validate_every: NonNegativeInt = Field(1000, description="steps between validations; 0: only at the end")
    validate_images: PositiveInt = Field(5000, description="images used in a validation, at most")
    sample_every: NonNegativeInt = Field(0, description="steps between sample grids; 0: none")
    sample_classes: PositiveInt = Field(8, description="rows of a sample grid")
    sample_per_class: PositiveInt = Field(8, description="columns of a sample grid")
    evaluate_every: NonNegativeInt = Field(
        0, description="steps between evaluations of drawn images against real ones; 0: none"
    )
    evaluate_images: PositiveInt = Field(
        2000, description="images drawn for an evaluation, over all ranks and classes evenly"
    )
    evaluate_reference: Path | None = Field(
        None, description="real images' statistics, as mvar reference or the ADM suite writes them"
    )
    evaluate_features: Path | None = Field(
        None, description="Inception's file, as for mvar evaluate --features; default: EfficientNet-Lite0"
    )
    peak_tflops: PeakSetting = Field(
        "auto", description="of one GPU, for MFU: auto knows it by name; measure: torch.matmul at the start"
    )
    wandb: WandbMode | None = Field(None, description="Weights & Biases; default: what WANDB_MODE says, else offline")
    wandb_project: str = Field("mvar", description="Weights & Biases project")
    tensorboard: bool = Field(False, description="write TensorBoard events under the run folder")


class TrainConfig(Section):
    """Everything `mvar train` can be told."""

    run: Path = Field(description="folder of this run; the same command in the same folder resumes")
    seed: NonNegativeInt = Field(0, description="seed of weights, order of data, label dropping, stochastic depth")
    epochs: PositiveFloat = Field(200, description="passes over the store")
    max_steps: PositiveInt | None = Field(None, description="end after so many steps; the schedule keeps its length")
    global_batch: PositiveInt = Field(768, description="images per optimizer step, over all ranks")
    init_from: Path | None = Field(
        None, description="begin with the weights of a run, checkpoint, .safetensors or published .pth (resume.md)"
    )
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    data: DataConfig
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig())
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig())
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig())
    trust: TrustConfig = Field(default_factory=lambda: TrustConfig())
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig())
