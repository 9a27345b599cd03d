"""`make bench-gpu`: what this GPU does with mvar, beside published kernels and VAR in the same call, in five minutes.

Each part runs in a process of its own with a limit of its own, so that one that fails or hangs costs no other; figures
are written to --json after every part. MFU: operations as in `mvar.plan.flops` over the data sheet's dense bf16 peak.

machine       matmul_tflops_bf16, matmul_tflops_tf32, matmul_tflops_fp32, copy_tb_s
warm          compiles mamba-ssm's kernels, all configurations, side by side: minutes at the first start, then cached
train_dN      train_dN_imgs_per_s, _mfu, _step_ms, _peak_gib, _memory_vs_plan: `mvar train`'s step on made-up codes of
              256 px, bf16, ZeRO 2. Depth 16 also: save_stall_s, how long a save stops the training;
              train_d16_late_step_ms: a step whose numbers are read in the next one, as by `mvar train`; of such steps
              train_d16_kernels_ms (some kernel runs), _gpu_busy (the same as a share), _kernels (how many), and in the
              context train_d16_profile (kinds of kernels, when the GPU waits and what the host does then) and
              train_d16_host (where Python is)
train_var16   train_var16_imgs_per_s: VAR-d16 in plain torch with autocast and fused AdamW, same batch
mixer         mixer_ms: our kernels of Mamba-2 between its two linear layers, forward and backward, 64 images, width
              1,024, bf16; mixer_mamba_ssm_chunkN_ms: mamba-ssm's fused call for the same; mixer_vs_mamba_ssm: against
              its fastest; mixer_profile: time by kernel of ours
train_d16_triton, sample_d16_triton  the same as without, on our kernels of the mixer where `auto` takes mamba-ssm's
sample_dN     sample_dN_imgs_per_s: 128 images with guidance and decoder, bf16; sample_d16_latency_ms: one image;
              sample_d16_profile: time by kind of kernel of 128 images
sample_var30  sample_var30_imgs_per_s: key-value cache, same quantizer, filters and decoder; sample_d24_vs_var30
maps          conv_CxSIDE_TYPE_LAYOUT_HOW_tflops: a 3x3 convolution of the tokenizer, 32 images, channels first and
              last, by cuDNN's heuristics, as it tries out, as one matrix product; norm_..._ours_ms, _torch_ms: group
              norm and SiLU
tokenize      tokenize_bf16_imgs_per_s, tokenize_bf16_agreement (share of fp32's codes), tokenize_fp32_imgs_per_s
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_context import GOALS, Context, Scale
from benchmarks.gpu_kernels import machine, mixer, warm
from benchmarks.gpu_maps import maps
from benchmarks.gpu_pictures import sample, sample_var, tokenize
from benchmarks.gpu_training import train, train_var
from benchmarks.harness import Report, parser

PARTS: dict[str, tuple[int, Callable[[Context], None]]] = {
    "machine": (30, machine),
    "warm": (200, warm),
    "train_d16": (130, lambda context: train(context, 16, 64)),
    "sample_d16": (80, lambda context: sample(context, 16)),
    "mixer": (60, mixer),
    "train_d16_triton": (60, lambda context: train(context, 16, 64, mamba="triton")),
    "sample_d16_triton": (60, lambda context: sample(context, 16, mamba="triton")),
    "tokenize": (60, tokenize),
    "maps": (60, maps),
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
    options.add_argument(
        "--traces", type=Path, metavar="FOLDER", help="keep the profiles (benchmarks/idle.py reads them)"
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
        PARTS[args.part][1](Context(Scale(args.tiny), device, Report("gpu"), overrides, args.json, args.traces))
        return 0
    # Kernels are tuned once, and what was found is kept beside them.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    report, began_s, problems = Report("gpu", context={"set": args.set, "tiny": args.tiny}), time.monotonic(), {}
    passed_on = [*(["--tiny"] if args.tiny else []), *(word for pair in args.set for word in ("--set", pair))]
    passed_on += ["--traces", str(args.traces)] if args.traces else []
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
