"""`make bench-gpu`: what this GPU does with mvar, beside published kernels and VAR in the same call, in five minutes.

Each part runs in a process of its own with a limit of its own, so that one that fails or hangs costs no other; figures
are written to --json after every part. MFU: operations as in `mvar.plan.flops` over the data sheet's dense bf16 peak.

machine       matmul_tflops_bf16, matmul_tflops_tf32, matmul_tflops_fp32, copy_tb_s
warm          compiles mamba-ssm's kernels, all configurations, side by side: minutes at the first start, then cached
train_dN      train_dN_imgs_per_s, _mfu, _step_ms, _peak_gib, _memory_vs_plan: `mvar train`'s step on made-up codes of
              256 px, bf16, ZeRO 2. Depth 16 also: save_stall_s, how long a save stops the training
train_var16   train_var16_imgs_per_s: VAR-d16 in plain torch with autocast and fused AdamW, same batch
mixer         mixer_ms: our Mamba-2 between its two linear layers, forward and backward, 64 images, width 1,024, bf16;
              mixer_mamba_ssm_chunkN_ms: mamba-ssm's fused call for the same; mixer_vs_mamba_ssm: against its fastest
sample_dN     sample_dN_imgs_per_s: 128 images with guidance and decoder, bf16; sample_d16_latency_ms: one image
sample_var30  sample_var30_imgs_per_s: key-value cache, same quantizer, filters and decoder; sample_d24_vs_var30
tokenize      tokenize_bf16_imgs_per_s, tokenize_bf16_agreement (share of fp32's codes), tokenize_fp32_imgs_per_s
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Report, parser, seconds_of, spread
from mvar.plan.gpus import recognise

GOALS = {
    "train_d16_imgs_per_s": ">= 300",
    "train_d16_mfu": ">= 0.40",
    "train_d24_mfu": ">= 0.45",
    "train_d30_mfu": ">= 0.50",
    "mixer_vs_mamba_ssm": ">= 1.3",
    "sample_d16_imgs_per_s": ">= 150",
    "sample_d24_imgs_per_s": ">= 75",
    "sample_d30_imgs_per_s": ">= 40",
    "sample_d24_vs_var30": ">= 1.5",
    "sample_d16_latency_ms": "<= 40",
    "tokenize_bf16_imgs_per_s": ">= 1000",
    "tokenize_fp32_imgs_per_s": ">= 120",
    "save_stall_s": "<= 0.25",
}
CHUNKS = (64, 128, 256)
SAMPLED = 128


@dataclass(frozen=True)
class Scale:
    """How large everything is: as the goals have it, or tiny for a rehearsal on a CPU."""

    tiny: bool

    @property
    def geometry(self) -> dict[str, Any]:
        """What a model is told besides its depth."""
        return {"width": 64, "heads": 2, "patch_nums": (1, 2, 3, 4)} if self.tiny else {}

    @property
    def tokenizer(self) -> dict[str, Any]:
        return {"channels": 32, "patch_nums": (1, 2, 3, 4)} if self.tiny else {}

    def depth(self, depth: int) -> int:
        return 2 if self.tiny else depth

    def images(self, images: int) -> int:
        return 2 if self.tiny else images


@dataclass(frozen=True)
class Context:
    """What a part is given."""

    scale: Scale
    device: torch.device
    report: Report
    overrides: dict[str, Any]
    """Of the training's configuration, by dotted key."""
    into: Path
    """Written anew with every figure, so that a part that is stopped has not been in vain."""

    def add(self, key: str, value: float, how: dict[str, Any] | None = None) -> None:
        self.report.add(key, value, GOALS.get(key), how)
        self.into.write_text(json.dumps({"figures": self.report.figures, "context": self.report.context}))
        print(f"  {key}: {value:,.4g}" + (f"   goal {GOALS[key]}" if key in GOALS else ""), flush=True)

    def timed(self, run: Callable[[], object], rounds: int = 5, warm: int = 2) -> list[float]:
        """Seconds of each round after the warm-up, each waited for."""
        if self.scale.tiny:
            rounds, warm = 1, 0
        for _ in range(warm):
            run()
        self.wait()
        return [seconds_of(run) for _ in range(rounds)]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def machine(context: Context) -> None:
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        n = 64 if context.scale.tiny else 8192 if name != "fp32" else 4096
        a, b = (torch.randn(n, n, device=context.device, dtype=dtype) for _ in range(2))
        context.add(f"matmul_tflops_{name}", 2e-12 * n**3 / min(context.timed(partial(torch.matmul, a, b), 10)))
    source = torch.empty(2**10 if context.scale.tiny else 2**30, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    context.add("copy_tb_s", 2e-12 * source.numel() / min(context.timed(lambda: target.copy_(source), 10)))


# ---- training


def train(context: Context, depth: int, batch: int, recompute: Any = "off") -> None:
    """`mvar train`'s step through DeepSpeed, on made-up codes; with half the images where they do not fit."""
    from mvar.run import world as processes

    world = processes.start()
    images = context.scale.images(batch)
    while True:
        try:
            with tempfile.TemporaryDirectory() as folder:
                train_on(context, world, depth, images, recompute, Path(folder))
            break
        except torch.OutOfMemoryError:
            print(f"  {images} images do not fit", flush=True)
            if images < 8:
                raise
            images //= 2
        gc.collect()
        torch.cuda.empty_cache()
    processes.finish()


def train_on(context: Context, world: Any, depth: int, images: int, recompute: Any, folder: Path) -> None:
    from benchmarks.checkpoint import Run
    from mvar.config import TrainConfig
    from mvar.plan.flops import flops
    from mvar.plan.memory import Setup, memory
    from mvar.plan.sizes import Sizes

    name = f"train_d{depth}"
    tree: dict[str, Any] = {
        "run": str(folder),
        "global_batch": images,
        "data": {"store": "none"},
        "model": {"depth": context.scale.depth(depth), "num_classes": 1000, **context.scale.geometry},
        "engine": {"precision": "bf16", "ds_config": "ds_configs/zero2.json", "activation_checkpointing": recompute},
    }
    for key, value in context.overrides.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    config = TrainConfig.model_validate(tree)
    run = Run(config, world, made_up_weights())
    run.step()
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = context.timed(run.step, 8, 4)
    step_s, sizes = statistics.median(taken), Sizes.of(config.model)
    context.add(f"{name}_imgs_per_s", images / step_s, spread(taken) | {"batch": images, "recompute": recompute})
    context.add(f"{name}_step_ms", 1e3 * step_s)
    if context.device.type == "cuda":
        gpu = recognise(torch.cuda.get_device_name())
        if gpu is not None:
            context.add(f"{name}_mfu", images / step_s * flops(sizes).training / (gpu.bf16_tflops * 1e12))
        peak = torch.cuda.max_memory_allocated()
        context.add(f"{name}_peak_gib", peak / 2**30)
        setup = Setup(2, "bf16", 1, recompute=config.engine.activation_checkpointing)
        context.add(f"{name}_memory_vs_plan", peak / memory(sizes, setup, images).peak)
    if depth == 16:
        save(context, run, folder / "checkpoints")


def made_up_weights() -> Callable[[str, tuple[int, ...]], Tensor]:
    """Values for a benchmark: true ones take a minute for a billion parameters."""
    pool = torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02

    def values(_name: str, shape: tuple[int, ...]) -> Tensor:
        numel = int(torch.Size(shape).numel())
        return pool.repeat(-(-numel // len(pool)))[:numel].view(shape)

    return values


def save(context: Context, run: Any, folder: Path) -> None:
    """How long saves in the background stop the training. The first allocates the buffer and is not counted."""
    from mvar.checkpoint.record import Identity
    from mvar.checkpoint.saver import Saver

    config, stalls = run.config, []
    saver = Saver(
        folder, run.engine.partition, run.engine.world, Identity(config, config.model, "0" * 64), config.checkpoint
    )
    for _ in range(2):
        saver.save(run.engine.progress(run.done))
        while not saver.ended:
            run.step()
        stalls += saver.settle()
    context.add("save_stall_s", stalls[-1].stall_s, {"seconds": stalls[-1].seconds, "first_stall_s": stalls[0].stall_s})


def train_var(context: Context, depth: int, batch: int) -> None:
    from benchmarks.var import VAR

    images = context.scale.images(batch)
    with context.device:
        model = VAR(context.scale.depth(depth), **context.scale.geometry)
        labels_B = torch.randint(1000, (images,))
        x_BLC = torch.randn(images, model.offsets[-1] - 1, 32)
        codes_BL = torch.randint(4096, (images, model.offsets[-1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16):
            logits_BLV = model(labels_B, x_BLC)
            loss = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()

    taken = context.timed(step, 5, 3)
    context.add(f"train_var{depth}_imgs_per_s", images / statistics.median(taken), spread(taken) | {"batch": images})


# ---- the mixer


def both_ways(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], None]:
    def run() -> None:
        out = function(*leaves)
        out.backward(torch.ones_like(out))
        for leaf in leaves:
            leaf.grad = None

    return run


def mixer(context: Context) -> None:
    from mvar.model.mamba2 import NORM_EPS, Mamba2

    images, tokens, width = (2, 30, 64) if context.scale.tiny else (64, 680, 1024)
    with context.device:
        module = Mamba2(width)
    nn.init.uniform_(module.A_log, 0.0, 2.7)
    rows = module.in_proj.weight.shape[0]
    # What lies between the linear layers, with the parameters as a 16-bit engine keeps them.
    module.exact_3H = torch.stack([p.detach().clone() for p in (module.dt_bias, module.A_log, module.D)])
    module.to(torch.bfloat16)
    module.in_proj = module.out_proj = nn.Identity()  # type: ignore[assignment]
    zxbcdt_BLE = torch.randn(images, tokens, rows, device=context.device, dtype=torch.bfloat16).requires_grad_()
    ours_s = statistics.median(context.timed(both_ways(module, zxbcdt_BLE), 20, 5))
    context.add("mixer_ms", 1e3 * ours_s)
    if context.device.type != "cuda":
        return
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined as fused

    leaves = [zxbcdt_BLE, module.conv1d.weight.squeeze(1), module.conv1d.bias, module.norm.weight]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    decays = [module.exact_3H[0], -module.exact_3H[1].exp(), module.exact_3H[2]]
    decays = [decay.detach().requires_grad_() for decay in decays]
    theirs_s = []
    for chunk in CHUNKS:

        def call(*leaves: Tensor, chunk: int = chunk) -> Tensor:
            x, weight, bias, norm, dt_bias, a, d = leaves
            out: Tensor = fused(
                *(x, weight, bias, dt_bias, a),
                D=d,
                chunk_size=chunk,
                activation="silu",
                rmsnorm_weight=norm,
                headdim=64,
                rmsnorm_eps=NORM_EPS,
                ngroups=1,
                norm_before_gate=False,
            )
            return out

        theirs_s.append(statistics.median(context.timed(both_ways(call, *leaves, *decays), 20, 5)))
        context.add(f"mixer_mamba_ssm_chunk{chunk}_ms", 1e3 * theirs_s[-1])
    context.add("mixer_vs_mamba_ssm", min(theirs_s) / ours_s)


WARM = """
import sys, torch
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan
chunk, start = int(sys.argv[1]), len(sys.argv) > 2
x, dt, b, c = (torch.randn(64, 680, *s, device="cuda", dtype=torch.bfloat16).requires_grad_()
               for s in ((32, 64), (32,), (1, 64), (1, 64)))
a = (-torch.rand(32, device="cuda") * 15 - 1).requires_grad_()
d, bias = torch.ones(32, device="cuda", requires_grad=True), torch.zeros(32, device="cuda", requires_grad=True)
state = torch.zeros(64, 32, 64, 64, device="cuda") if start else None
with torch.set_grad_enabled(not start):
    y, _ = scan(x, dt, a, b, c, chunk, D=d, dt_bias=bias, dt_softplus=True, initial_states=state,
                return_final_states=True)
if not start:
    y.backward(torch.ones_like(y))
torch.cuda.synchronize()
"""


def warm(context: Context) -> None:
    """One process for each chunk length, and one that starts from a state."""
    if context.device.type != "cuda":
        return
    words = [[str(chunk)] for chunk in CHUNKS] + [[str(chunk), "state"] for chunk in CHUNKS[1:]]
    started = [subprocess.Popen([sys.executable, "-c", WARM, *arguments]) for arguments in words]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError("mamba-ssm's kernels could not be compiled or run")


# ---- pictures


def tokenizer_of(context: Context) -> Any:
    from mvar import VQVAE

    torch.manual_seed(0)
    with context.device:
        return VQVAE(**context.scale.tokenizer).eval()


def sampling(context: Context, name: str, drawing: Callable[[Any, int], Callable[[Tensor, range], Tensor]]) -> None:
    """`drawing(tokenizer, images)` gives a function of that many labels and seeds that draws pictures."""
    tokenizer = tokenizer_of(context).to(memory_format=torch.channels_last)

    def timed(images: int, rounds: int, warm: int) -> list[float]:
        draw, labels_B = drawing(tokenizer, images), torch.arange(images) % 1000
        return context.timed(lambda: draw(labels_B, range(images)), rounds, warm)

    images = context.scale.images(SAMPLED)
    taken = timed(images, 3, 2)
    context.add(f"{name}_imgs_per_s", images / statistics.median(taken), spread(taken) | {"batch": images})
    if name == "sample_d16":
        taken = timed(1, 9, 3)
        context.add(f"{name}_latency_ms", 1e3 * statistics.median(taken), spread(taken))


def decoded(tokenizer: Any, f_hat_BChw: Tensor) -> Tensor:
    """As `mvar sample` decodes in bf16."""
    with torch.autocast(f_hat_BChw.device.type, torch.bfloat16, cache_enabled=False):
        pixels: Tensor = tokenizer.decode_latent(f_hat_BChw)
    return pixels


def sample(context: Context, depth: int) -> None:
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
        model = MVAR(context.scale.depth(depth), **context.scale.geometry)
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    model.store_matmuls_(torch.bfloat16).eval()

    def drawing(tokenizer: Any, images: int) -> Callable[[Tensor, range], Tensor]:
        return GraphedDrawing(
            model, tokenizer, images, lambda f_hat: decoded(tokenizer, f_hat), DEFAULTS, graphed=on_gpu
        )

    sampling(context, f"sample_d{depth}", drawing)


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


# ---- all of it

PARTS: dict[str, tuple[int, Callable[[Context], None]]] = {
    "machine": (30, machine),
    "warm": (200, warm),
    "train_d16": (100, lambda context: train(context, 16, 64)),
    "sample_d16": (60, lambda context: sample(context, 16)),
    "mixer": (60, mixer),
    "tokenize": (60, tokenize),
    "sample_d24": (60, lambda context: sample(context, 24)),
    "sample_var30": (60, lambda context: sample_var(context, 30)),
    "train_d24": (90, lambda context: train(context, 24, 32, "selective")),
    "train_var16": (60, lambda context: train_var(context, 16, 64)),
    "sample_d30": (60, lambda context: sample(context, 30)),
    "train_d30": (120, lambda context: train(context, 30, 24, "every")),
}
"""Most wanted first. Limits in seconds."""


def collect(name: str, options: Sequence[str], report: Report, limit_s: float) -> str | None:
    """Run a part and take over its figures; what went wrong, if anything did."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--json", str(path), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, errors = process.communicate()
            errors += f"\nstopped: longer than {limit_s:.0f} s"
        if path.exists():
            found = json.loads(path.read_text())
            report.figures |= found["figures"]
            report.goals |= {key: goal for key, goal in GOALS.items() if key in found["figures"]}
            report.context |= found["context"]
        return None if process.returncode == 0 else "\n".join(errors.strip().splitlines()[-12:])


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--only", default="", help=f"parts, in this order: {','.join(PARTS)} (default: all)")
    options.add_argument("--limit-s", type=float, default=290, help="start no part after so many seconds (default 290)")
    options.add_argument(
        "--tiny", action="store_true", help="a rehearsal: everything tiny, one round, figures mean nothing"
    )
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for training: engine.compile=off"
    )
    options.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    names = [name for name in args.only.split(",") if name] or list(PARTS)
    unknown = set(names) - set(PARTS)
    if unknown:
        options.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.tiny:
        print(f"skipped: torch {torch.__version__} sees no GPU here (--tiny rehearses on a CPU).")
        return 0
    device = torch.device("cuda" if on_gpu else "cpu")
    if args.part:
        overrides = dict(pair.split("=", 1) for pair in args.set)
        PARTS[args.part][1](Context(Scale(args.tiny), device, Report("gpu"), overrides, args.json))
        return 0
    # Kernels are tuned once, and what was found is kept beside them.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    report, began_s, problems = Report("gpu", context={"set": args.set, "tiny": args.tiny}), time.monotonic(), {}
    passed_on = [*(["--tiny"] if args.tiny else []), *(word for pair in args.set for word in ("--set", pair))]
    for name in names:
        left_s = args.limit_s - (time.monotonic() - began_s)
        if left_s < 5:
            print(f"== {name}: left out, --limit-s {args.limit_s:.0f} is over", flush=True)
            continue
        print(f"== {name} [{time.monotonic() - began_s:.0f} s]", flush=True)
        problem = collect(name, passed_on, report, min(PARTS[name][0] * (5 if args.tiny else 1), max(left_s, 30)))
        if problem is not None:
            problems[name] = problem
            print(f"== {name} FAILED\n{problem}", flush=True)
        compare(report)
        report.context |= {"problems": problems, "seconds": time.monotonic() - began_s}
        report.write(args.json)
    report.finish(args)
    return 1 if problems else 0


def compare(report: Report) -> None:
    """Ratios of figures of several parts."""
    ours, theirs = (report.figures.get(f"sample_{name}_imgs_per_s") for name in ("d24", "var30"))
    if ours is not None and theirs is not None:
        report.add("sample_d24_vs_var30", ours / theirs, GOALS["sample_d24_vs_var30"])


if __name__ == "__main__":
    raise SystemExit(main())
