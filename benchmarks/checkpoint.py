"""How long a save stops the training, against DeepSpeed's own synchronous `save_checkpoint` in the same run.

A d12 (198 M parameters, fp32, ZeRO 2, one process) trains on made-up codes. In each round DeepSpeed saves; then we save
in the background while training goes on, until the checkpoint exists. Ours is also synced to disk and digested, which
DeepSpeed's is not.

stall_vs_sync      seconds that our save held training up (snapshot and commit), divided by DeepSpeed's save_checkpoint
all_in_vs_sync     the same, plus what the steps taken meanwhile lost to the writing thread
own_sync_vs_sync   our save without the background, divided by DeepSpeed's
write_mib_s        MiB of a checkpoint a second, from the call until the checkpoint exists
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Report, parser, seconds_of, spread
from mvar.checkpoint.record import Identity
from mvar.checkpoint.saver import Saved, Saver
from mvar.config import TrainConfig
from mvar.data.stream import Batch
from mvar.ds_config import BatchSplit
from mvar.run import world as worlds
from mvar.run.world import World
from mvar.schedule import Plan
from mvar.tokenizer.quantizer import Quantizer
from mvar.training.engine import Engine
from mvar.training.objective import Objective


def made_up_batch(config: TrainConfig, number: int) -> Batch:
    """Random codes and labels."""
    size, tokens = config.global_batch, sum(side**2 for side in config.model.patch_nums)
    generator = torch.Generator().manual_seed(number)
    places = np.arange(size, dtype=np.int64)
    return Batch(
        codes_BL=torch.randint(config.model.vocab_size, (size, tokens), generator=generator),
        labels_B=torch.randint(config.model.num_classes or 1, (size,), generator=generator),
        positions_B=places,
        indices_B=places,
        views_B=places,
        epochs_B=places,
        valid_B=np.ones(size, dtype=np.bool_),
        samples_seen=number * size,
    )


class Run:
    """An engine that trains on made-up batches. `values`: of the weights; default: as a training starts."""

    def __init__(
        self, config: TrainConfig, world: World, values: Callable[[str, tuple[int, ...]], Tensor] | None = None
    ) -> None:
        model = config.model
        quantizer = Quantizer(model.vocab_size, model.latent_channels, model.patch_nums)
        split = BatchSplit.of(config.global_batch, world.size, config.global_batch)
        self.config, self.done = config, 0
        self.engine = Engine(config, model, Plan.of(config, 10**6), split, Objective(quantizer, world.device), world)
        self.engine.initialise(values)

    def step(self) -> None:
        self.engine.step(self.done, [made_up_batch(self.config, self.done)])
        self.done += 1

    def close(self) -> None:
        """Free the engine's memory: DeepSpeed keeps every engine that is not told to go."""
        engine: Any = self.engine.model
        engine.destroy()

    def loss(self) -> Tensor:
        """Of the next batch, without a step."""
        batch = made_up_batch(self.config, self.done)
        return self.engine.objective(self.engine.model, batch.codes_BL, batch.labels_B).loss


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--depth", type=int, default=12, help="depth of the model (default 12)")
    options.add_argument("--batch", type=int, default=1, help="images of a step (default 1)")
    options.add_argument("--rounds", type=int, default=5, help="saves of each kind (default 5)")
    options.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        config = TrainConfig.model_validate(
            {
                "run": str(folder),
                "global_batch": args.batch,
                "data": {"store": "none"},
                "model": {"depth": args.depth, "num_classes": 1000},
                "engine": {"precision": "fp32", "ds_config": "ds_configs/zero2.json"},
            }
        )
        world = worlds.start()
        measure(Run(config, world), world, folder, args.rounds).finish(args)
        worlds.finish()
    return 0


def measure(run: Run, world: World, folder: Path, rounds: int) -> Report:
    report = Report("checkpoint")
    identity = Identity(run.config, run.config.model, "0" * 64)
    partition = run.engine.partition
    engine: Any = run.engine.model
    background, waiting = (
        Saver(folder / kind, partition, world, identity, run.config.checkpoint.model_copy(update={"background": kind}))
        for kind in ("auto", "off")
    )
    calm_s, busy_s, theirs_s, own_s = [], [], [], []
    saved: list[Saved] = []
    for number in range(rounds + 1):  # The first round warms up.
        run.step()
        calm_s.append(seconds_of(run.step))
        theirs_s.append(seconds_of(lambda: engine.save_checkpoint(str(folder / "theirs"), tag="t", save_latest=False)))
        shutil.rmtree(folder / "theirs")
        own_s.append(seconds_of(lambda: waiting.save(run.engine.progress(run.done))))
        shutil.rmtree(folder / "off")
        background.save(run.engine.progress(run.done))
        busy_s.append(0.0)
        while not background.ended:
            busy_s[-1] += max(0.0, seconds_of(run.step) - calm_s[-1])
        saved += background.settle()
        shutil.rmtree(folder / "auto")
        print(
            f"round {number}: save_checkpoint {theirs_s[-1]:.2f} s, ours at once {own_s[-1]:.2f} s; in the background"
            f" {saved[-1].seconds:.2f} s of which training stood {saved[-1].stall_s:.2f} s and its steps lost"
            f" {busy_s[-1]:.2f} s",
            flush=True,
        )
    stall_s, whole_s = [one.stall_s for one in saved[1:]], [one.seconds for one in saved[1:]]
    theirs, stall = statistics.median(theirs_s[1:]), statistics.median(stall_s)
    report.add("stall_vs_sync", stall / theirs, "< 0.15", {"stall_s": spread(stall_s), "sync_s": spread(theirs_s[1:])})
    report.add("all_in_vs_sync", (stall + statistics.median(busy_s[1:])) / theirs)
    report.add("own_sync_vs_sync", statistics.median(own_s[1:]) / theirs)
    report.add("write_mib_s", partition.bytes_of_all / 2**20 / statistics.median(whole_s))
    report.context["parameters"] = run.engine.parameters
    return report


if __name__ == "__main__":
    raise SystemExit(main())
