"""`mvar evaluate-checkpoints`: figures of every kept checkpoint of a run, also beside the training.

    mvar evaluate-checkpoints runs/d16 --tokenizer vae.pth --reference imagenet.npz --features inception.pt --num 10000

Pictures are drawn, looked at and thrown away. Each checkpoint's figures are a line of RUN/evaluations.jsonl, which
`mvar report` and `mvar status` show; what is there with the same settings is not made again. With --watch it goes on
until the training is finished and all its checkpoints have figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar.checkpoint.fingerprint import fingerprint
from mvar.cli import run_command
from mvar.errors import CheckpointError, ConfigError
from mvar.evaluation import EVALUATIONS
from mvar.evaluation.drawn import DrawnPictures
from mvar.evaluation.extractors import Extractor, open_extractor
from mvar.evaluation.figures import measure
from mvar.evaluation.reference import Reference, read_reference
from mvar.evaluation.run_record import add_evaluation, one_line
from mvar.evaluation.told import keys
from mvar.files.json_lines import read
from mvar.log import log
from mvar.run.folder import RunFolder
from mvar.run.names import folder_of, steps_in
from mvar.sampling.arguments import add_sampling_options, sampling_options
from mvar.sampling.loading import ModelPair, pick_device
from mvar.sampling.painter import CPU_BATCH
from mvar.sampling.pictures import BALANCED, counts_of, in_turn
from mvar.sampling.planning import Request


@dataclass(frozen=True)
class Task:
    """What is measured of each checkpoint."""

    args: argparse.Namespace
    extractor: Extractor
    reference: Reference

    @property
    def settings(self) -> dict[str, Any]:
        """What makes figures comparable, as it stands in their record."""
        options = json.loads(json.dumps(dataclasses.asdict(sampling_options(self.args))))
        identity = self.extractor.identity
        return {
            "images": self.args.num,
            "options": options,
            "seed": self.args.seed,
            "ema": self.args.ema,
            "features_sha256": identity.sha256,
            "reference_sha256": self.reference.sha256,
        }

    def is_made(self, record: Mapping[str, Any]) -> bool:
        return all(record.get(key) == value for key, value in self.settings.items())

    def measure(self, run: Path, step: int) -> str:
        """Draw, look, note; returns the line to show. Raises MvarError."""
        args = self.args
        source = ModelPair.load(run, args.tokenizer, step=step, ema=args.ema)
        counts = counts_of(list(range(source.num_classes)), BALANCED, args.num)
        options, device = sampling_options(args), pick_device(args.device)
        request = Request(source, counts, options, args.seed, device, precision=args.precision, batch=args.batch)
        precision = request.decided_precision()
        batch = args.batch or request.fitting_batch(precision)
        painter = request.painter(precision, batch, compiled=request.decided_compile())
        size = source.tokenizer.image_size
        pictures = DrawnPictures(f"samples of step {step}", in_turn(counts), painter, size)
        named = f"--reference {args.reference}"
        found, measured = measure(pictures, self.extractor, self.reference, named, device, batch=painter.batch)
        figures = keys(measured, self.extractor.identity)
        drawn = self.settings | {"arithmetic": precision, "samples_sha256": found.sha256}
        drawn |= {"weights": fingerprint(source.state), "tokenizer": fingerprint(source.tokenizer.state_dict())}
        add_evaluation(run, step, len(pictures), figures, self.extractor.identity, self.reference, drawn)
        return f"step {step:>9,}  {len(pictures):,} samples: {one_line(figures)}"


def waiting(run: Path, task: Task) -> list[int]:
    """Steps of kept checkpoints that have no figures yet, oldest first."""
    made = {record.get("step") for record in read(run / EVALUATIONS) if task.is_made(record)}
    return [step for step in steps_in(run / "checkpoints") if step not in made]


def evaluate_waiting(run: Path, task: Task) -> int:
    """All of them; returns how many were measured. A checkpoint that is removed meanwhile is passed over."""
    measured = 0
    for step in waiting(run, task):
        try:
            print(task.measure(run, step), flush=True)
            measured += 1
        except CheckpointError:
            if folder_of(run / "checkpoints", step).is_dir():
                raise
            log.warning("step %d: its checkpoint was removed meanwhile (checkpoint.keep_last, keep_every).", step)
    return measured


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mvar evaluate-checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--tokenizer", type=Path, required=True, help="file of the tokenizer that made the codes")
    add("--reference", type=Path, required=True, help=".npz of `mvar reference` or of the ADM evaluation suite")
    add("--features", type=Path, help="Inception's file, as for mvar evaluate (default: efflite0)")
    add("--num", type=int, default=10_000, help="samples of each checkpoint, of all classes evenly (default 10000)")
    add("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    add("--seed", type=int, default=0, help="other seed, other images (default 0)")
    add("--batch", type=int, help="images drawn together (default: what fits)")
    add("--precision", default="auto", help="arithmetic, as for mvar sample (default auto)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    add("--watch", action="store_true", help="go on until the training is finished")
    add("--every-s", type=float, default=60.0, help="with --watch: seconds between two looks (default 60)")
    add_sampling_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.num < 1 or args.every_s <= 0:
        raise ConfigError("--num and --every-s: expected numbers above 0.")
    if not args.run.is_dir():
        raise ConfigError(f"{args.run}: no such folder. Give a run that was trained, or that is being trained.")
    extractor = open_extractor(args.features, pick_device(args.device))
    task = Task(args, extractor, read_reference(args.reference, extractor, batch=CPU_BATCH))
    run, measured = RunFolder(args.run), 0
    while True:
        finished = run.finished.exists()  # Before the look, so that none is missed.
        measured += evaluate_waiting(args.run, task)
        if finished or not args.watch:
            break
        time.sleep(args.every_s)
    if not measured and not waiting(args.run, task):
        log.info("%s: every kept checkpoint has figures with these settings.", args.run)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
