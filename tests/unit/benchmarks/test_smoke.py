"""Every benchmark of a CPU measures what its page says, at a size that means nothing."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.parts import PARTS
from mvar.testing.ranks import Ranks

MODEL = "--depth 2 --size tiny --batch 1 --rounds 1"
BOTH = ("fp32_b1", "bf16_b1")
TINY: dict[str, tuple[str, set[str]]] = {
    "roofline": ("--tiny --rounds 1", {"matmul_gflops_fp32", "matmul_gflops_bf16", "peak_gflops_bf16", "memory_gib_s"}),
    "store_read": (
        "--samples 1024 --rounds 1",
        {"random_vs_webdataset", "samples_per_s", "webdataset_samples_per_s", "first_batch_s", "first_batch_spread"},
    ),
    "startup": (
        "--depth 2 --size tiny --rounds 1",
        {
            *("help_s", "status_s", "import_s", "start_s", "imports_and_joining_the_ranks_s", "first_step_s"),
            *("store_run_folder_and_machine_s", "checkpoint_s", "model_and_engine_s", "weights_s"),
        },
    ),
    "scaling": (
        "--tiny --rounds 1",
        {
            *("exponent_step", "exponent_tokens", "exponent_tokens_dense", "zero1_state_vs_plan"),
            *(
                f"zero{stage}_{what}"
                for stage in (2, 3)
                for what in ("bytes_vs_theory", "bytes_vs_plan", "state_vs_plan")
            ),
        },
    ),
    "collectives": ("--rounds 1 --mib 1 2 4 --worlds 2", {"worst_error_2", "gb_s_2", "hop_us_2"}),
    "evaluate": ("--images 200 --size 16 --width 32 --threads 1", {"seconds", "cpu_seconds", "peak_rss_gib"}),
    "tokenize_identical": (
        "--made 2 --channels 32 --tasks 1 --kills 0",
        {"identical", "kills", "one_imgs_per_s", "tasks_imgs_per_s", "killed_imgs_per_s"},
    ),
    "tokenize": (
        "--images 1 --batch 1 --channels 32 --rounds 1 --threads 1",
        {
            *("fp32_vs_loop", "bf16_vs_loop", "encoder_busy", "encoder_busy_bf16", "code_agreement_bf16"),
            *("loop_imgs_per_s", "fp32_imgs_per_s", "bf16_imgs_per_s"),
        },
    ),
    "checkpoint": ("--depth 2 --rounds 1", {"stall_vs_sync", "all_in_vs_sync", "own_sync_vs_sync", "write_mib_s"}),
    "train_step": (
        f"{MODEL} --compile off",
        {"memory_vs_plan_fp32_b1"}
        | {f"{what}_{end}" for what in ("tokens_vs_baseline", "tokens_per_s", "peak_share") for end in BOTH},
    ),
    "against_var": (
        f"{MODEL} --compile off",
        {
            f"{what}_{end}"
            for what in ("tokens_vs_var", "transformer_vs_var", "step_s", "var_step_s", "sampling_s", "var_sampling_s")
            for end in BOTH
        },
    ),
    "sample": (
        f"{MODEL.replace('--batch 1', '--batch 1 2')} --decoder-channels 32",
        {f"end_to_end_vs_recompute_{end}" for end in BOTH}
        | {
            f"{what}_{end}"
            for what in ("transformer_vs_recompute", "peak_share", "imgs_per_s")
            for end in (*BOTH, "fp32_b2", "bf16_b2")
        },
    ),
}
"""Options of each, and the figures that it must give."""
STARTS_RANKS = {"scaling", "collectives"}
MAY_BE_NOTHING = re.compile("kills|worst_error|hop_us|exponent|encoder_busy|code_agreement|stall_vs_sync")
"""Figures that tiny sizes may bring to 0 or below it."""


def test_every_part_of_the_whole_run_is_tried_here() -> None:
    assert {part.module for part in PARTS} == set(TINY)


@pytest.mark.parametrize("module", TINY)
def test_it_measures_what_it_says(module: str, tmp_path: Path) -> None:
    words, expected = TINY[module]
    path = tmp_path / f"{module}.json"
    argv = [*words.split(), "--json", str(path)]
    if module in STARTS_RANKS:
        assert importlib.import_module(f"benchmarks.{module}").main(argv) == 0
    else:
        ranks = Ranks("mvar.testing.ranks:command", [f"benchmarks.{module}", argv], 1, tmp_path / "log")
        assert ranks.wait() == [0], ranks.output()

    found = json.loads(path.read_text())
    figures = found["figures"]
    assert set(figures) == expected
    assert [key for key, value in figures.items() if not math.isfinite(value)] == []
    assert [key for key, value in figures.items() if value <= 0 and not MAY_BE_NOTHING.search(key)] == []
    assert set(found["goals"]) <= expected
    assert (
        found["context"]["arguments"]["rounds" if "--rounds" in words else "images"] is not None
        or module == "tokenize_identical"
    )

    for part in PARTS:
        if part.module == module and part.name != module:
            shutil.copy(path, tmp_path / f"{part.name}.json")
    page.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert [key for key in figures if f"| {key} |" not in text] == []
    assert (tmp_path / page.PLOT).read_bytes().startswith(b"\x89PNG")
