"""Run folders as trainings leave them, small, with text that wants to be HTML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mvar.images.arrays import save_png

HOSTILE = "<script>document.title='taken'</script><img src=https://example.invalid/x.png>"


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def picture(path: Path, side_px: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8), sync=False)


def transformer_run(run: Path, steps: int = 150) -> Path:
    records: list[dict[str, Any]] = [{"kind": "resume", "step": 0, "samples": 0, "world": 2}]
    for step in range(1, steps + 1):
        loss = {"loss": 6 / step**0.2, "loss_per_scale": [5 / step**0.2, 7 / step**0.2], "accuracy": 0.1}
        speed = {"grad_norm": 0.5, "lr": 1e-3, "imgs_per_s": 50.0 + step % 7, "memory_gib": 1.5}
        records.append({"kind": "train", "step": step, "samples": 8 * step, **loss, **speed})
    records.insert(60, {"kind": "resume", "step": 59, "samples": 8 * 59, "world": 2})
    records.append({"kind": "val", "step": steps, "samples": 8 * steps, "loss": 3.0, "loss_per_scale": [2.5, 3.5]})
    records.append({"kind": "sample", "step": steps, "samples": 8 * steps, "file": f"samples/step-{steps:09d}.png"})
    lines(run / "metrics.jsonl", records)
    figures = [
        {"step": step, "images": 500, "fid": 90.0 - step / 10, "fid_error": 1.0, "fid_floor": 20.0, "cfg": 1.5}
        for step in (50, 100, 150)
    ]
    lines(run / "evaluations.jsonl", figures)
    start = {"event": "start", "pid": 1, "host": "node-7", "world": 2, "job": "41", "restarts": 0, "nodes": None}
    lines(
        run / "history.jsonl",
        [
            {**start, "time": 1e9, "allocated": None, "last_sign": None},
            {
                "event": "environment",
                "time": 1e9,
                "versions": {"torch": "2.99"},
                "device": "2 x GPU",
                "commit": "c0ffee",
            },
            {"event": "going_on", "time": 1e9, "step": 0},
            {"event": "skipped", "time": 1e9 + 5, "step": 30, "reason": "a loss was not finite", "bad_samples": [3]},
            {**start, "time": 1e9 + 60, "allocated": None, "last_sign": 1e9 + 50},
            {"event": "going_on", "time": 1e9 + 60, "step": 59},
            {"event": "end", "time": 1e9 + 160, "code": 75, "step": steps, "reason": f"asked to by {HOSTILE}"},
        ],
    )
    (run / "config.yaml").write_text(f"run: {run}\nmodel:\n  depth: 4\ndata:\n  store: '{HOSTILE}'\n")
    picture(run / "samples" / f"step-{steps:09d}.png")
    return run


def tokenizer_run(run: Path) -> Path:
    records: list[dict[str, Any]] = []
    for step in range(50, 401, 50):
        terms = {"loss": 1 / step, "l1": 0.5 / step, "codebook": 0.2, "grad_norm": 1.0, "lr": 1e-3, "revived": 2}
        records.append(
            {"kind": "train", "step": step, "samples": 32 * step, **terms, "psnr_db": 20.0, "imgs_per_s": 90.0}
        )
    quality = {"psnr_db": 21.0, "ssim": 0.9, "psnr_db_per_scale": [11.0, 21.0], "used_per_scale": [37, 300]}
    records.append({"kind": "val", "step": 400, "samples": 12800, **quality})
    lines(run / "metrics.jsonl", records)
    (run / "config.yaml").write_text("images: faces\ngeometry:\n  channels: 16\n")
    picture(run / "samples" / "step-000000400.png")
    picture(run / "reconstructions.png")
    return run
