"""Is a code store the same, whoever made it? The same images tokenized three times, on this machine's cores:

one     by one task on all cores
tasks   by several tasks at once, each with its share of shards and one core
killed  by as many tasks that claim shards, killed with SIGKILL at random moments and started again

identical      1 if the SHA-256 of every shard, the index, the manifest and the quantizer are the same in all three
kills          tasks that were killed while they worked
one_imgs_per_s, tasks_imgs_per_s, killed_imgs_per_s    images of the whole job / its seconds, starts included

Without --tokenizer one of the published geometry is made, with random weights (seeded) and words out of its encoder;
without --images, a few JPEGs. The stores stay in --out, each with its list in `sha256.txt`, and the same command goes
on with what is there. A real proof:

    python -m benchmarks.tokenize_identical --images emoji --out proof --kills 20 --pause 30 shard_samples=32
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import Report, parser
from benchmarks.tokenize import make_images, make_tokenizer
from data_prep.finalize import finalize
from mvar.cgroups import cores
from mvar.data.store import CodeStore
from mvar.errors import MvarError
from mvar.files.disk import sha256_of
from mvar.images.sources import ImageFolder

Start = Callable[[int], subprocess.Popen[bytes]]


def run(start: Start, tasks: int, kills: int, pause_s: float, seed: int) -> int:
    """Run tasks to their end; `kills` times one that works is killed and started again. Returns the kills.

    Pauses between kills are drawn from [0, 2 pause_s]. Raises MvarError if a task fails by itself.
    """
    rng = random.Random(seed)
    running = {task: start(task) for task in range(tasks)}
    killed = 0
    next_kill_s = time.monotonic() + rng.uniform(0, 2 * pause_s)
    while running:
        time.sleep(0.05)
        for task, process in list(running.items()):
            if process.poll() is None:
                continue
            if process.returncode:
                raise MvarError(f"task {task} failed with exit code {process.returncode}; see its log.")
            del running[task]
        if running and killed < kills and time.monotonic() >= next_kill_s:
            task = rng.choice(sorted(running))
            running[task].kill()
            if running[task].wait() < 0:
                killed += 1
            running[task] = start(task)
            next_kill_s = time.monotonic() + rng.uniform(0, 2 * pause_s)
    return killed


def digests(store: Path) -> list[str]:
    """Lines `sha256  name` of all that a finished store consists of."""
    manifest = CodeStore.open(store).manifest
    shards = [shard.name for split in manifest.splits.values() for shard in split.shards]
    names = [*sorted(shards), "index.npz", "manifest.json", "quantizer.safetensors"]
    return [f"{sha256_of(store / name)}  {name}" for name in names]


def measure(
    images: Path, tokenizer: Path, out: Path, tasks: int, kills: int, pause_s: float, keys: list[str]
) -> Report:
    report = Report("tokenize_identical")
    lists, killed, seconds_of_job = {}, 0, {}
    for job, count in (("one", 1), ("tasks", tasks), ("killed", tasks)):
        store = out / job
        settings = [f"source={images}", f"tokenizer={tokenizer}", f"store={store}"]
        settings += [*keys, f"threads={cores() if count == 1 else 1}"]
        store.mkdir(parents=True, exist_ok=True)

        def start(
            task: int, job: str = job, count: int = count, settings: list[str] = settings
        ) -> subprocess.Popen[bytes]:
            share = ["--task", str(task), "--tasks", str(count), *(["--claim"] if job == "killed" else [])]
            command = [sys.executable, "-m", "data_prep.tokenize", *settings, *share]
            with (out / f"{job}-{task}.log").open("ab") as log:
                return subprocess.Popen(command, stdout=log, stderr=log)

        begin_s = time.monotonic()
        done = run(start, count, kills if job == "killed" else 0, pause_s, seed=0)
        seconds_of_job[job] = time.monotonic() - begin_s
        killed += done
        finalize(store)
        lists[job] = digests(store)
        (out / job / "sha256.txt").write_text("\n".join(lists[job]) + "\n")
        print(f"{job}: {seconds_of_job[job]:.0f} s, {done} kills, {len(lists[job])} files", flush=True)
    samples = sum(info.samples for info in CodeStore.open(out / "one").manifest.splits.values())
    report.context["size"] = {"images": samples, "tasks": tasks, "keys": keys, "files": len(lists["one"])}
    report.add("identical", float(lists["one"] == lists["tasks"] == lists["killed"]), ">= 1")
    report.add("kills", killed, f">= {kills}")
    for job, seconds in seconds_of_job.items():
        report.add(f"{job}_imgs_per_s", samples / seconds)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=Path, help="folder of class folders; default: some are made up")
    arguments.add_argument("--out", type=Path, help="folder for the three stores; default: a temporary one")
    arguments.add_argument("--tokenizer", type=Path, help="tokenizer file; default: one is made")
    arguments.add_argument("--channels", type=int, default=160, help="width of the tokenizer that is made")
    arguments.add_argument("--made", type=int, default=24, help="images that are made up")
    arguments.add_argument("--tasks", type=int, default=4, help="tasks of the second and third job")
    arguments.add_argument("--kills", type=int, default=5, help="kills during the third job")
    arguments.add_argument("--pause", type=float, default=4, help="mean seconds between two kills")
    arguments.add_argument("keys", nargs="*", metavar="key=value", help="further keys of `mvar tokenize`")
    args = arguments.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        out, keys = args.out or Path(scratch), args.keys
        images = ImageFolder(args.images) if args.images else make_images(Path(scratch) / "images", args.made)
        if not args.images:
            keys = ["shard_samples=2", *keys]
        tokenizer = args.tokenizer or out / "tokenizer.safetensors"
        if not tokenizer.exists():
            make_tokenizer(tokenizer, args.channels, images)
        report = measure(images.root, tokenizer, out, args.tasks, args.kills, args.pause, keys)
    report.finish(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
