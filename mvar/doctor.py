"""`mvar doctor`: one screen of what this machine has, and of what mvar's `auto` settings come to on it.

    mvar doctor                                                     this machine
    mvar doctor --config recipes/d16.yaml run=runs/d16 --fix        for a recipe and a run folder; what to install
    srun --ntasks-per-node=8 python -m mvar.doctor                  also how fast the ranks talk to each other

Lines that begin with `-` are missing and can be done without; those with `!` will fail or be slow. Exit code 0 whatever
is found, 2 for a wrong recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mvar.cli import run_command
from mvar.config import TrainConfig
from mvar.errors import ConfigError
from mvar.files.disk import write_file
from mvar.machine import fabric, hardware, packages, selfcheck, storage
from mvar.machine.findings import Finding, Report, fixes, screen
from mvar.paths import expanded
from mvar.run.launcher import detect
from mvar.run.world import finish, join
from mvar.settings import load

PLACEHOLDERS = ["run=.", "data.store=none"]
"""What a recipe does not say and doctor does not need."""
CHOOSE_WITHIN_S = 180.0


def examine(config: TrainConfig | None, run: Path | None) -> Report:
    """Everything but the fabric. `run`: the run folder, which need not exist."""
    gpus = hardware.look_at_gpus()
    has_gpu = any(finding.name.startswith("GPU ") for finding in gpus)
    report: Report = {
        "machine": hardware.look_at_host(),
        "GPUs": gpus,
        "packages": packages.look(has_gpu),
        "compilers": hardware.look_at_compilers(has_gpu),
        "caches": storage.look_at_caches(),
        "self-check": [test.finding for test in selfcheck.try_machine()],
    }
    if run is not None:
        report["run folder"] = storage.look_at_folder(run)
    if config is not None:
        report["what is chosen"] = chosen(config)
    return report


def chosen(config: TrainConfig) -> list[Finding]:
    """What `auto` comes to, asked of a process of its own, since it imports kernels."""
    command = [sys.executable, "-c", "from mvar.doctor import say_choices; say_choices()"]
    asked = config.model_dump_json()
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=CHOOSE_WITHIN_S, check=False
        )
        said = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return [Finding("choosing", f"takes longer than {CHOOSE_WITHIN_S:.0f} s", "bad")]
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding("choosing", f"failed: {last}", "bad")]
    return [Finding(name, text, "bad" if name == "error" else "good") for name, text in said.items()]


def say_choices() -> None:
    """Print the choices for the configuration on stdin, as one line of JSON."""
    from mvar.errors import MvarError
    from mvar.model.backends import chosen_backends
    from mvar.model.kernels.arithmetic import Arithmetic

    config = TrainConfig.model_validate_json(sys.stdin.read())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = config.engine
    try:
        arithmetic = Arithmetic.of(engine.precision, engine.tf32, device)
        backends = chosen_backends(config.model, arithmetic, engine.compile)
        found = {one.what: str(one).removeprefix(f"{one.what}: ") for one in backends}
    except MvarError as error:
        found = {"error": str(error)}
    print("\n" + json.dumps(found))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a recipe: what `auto` comes to for it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe; run=FOLDER")
    parser.add_argument("--fix", action="store_true", help="print the commands that would mend what is missing")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and any(not word.startswith("run=") for word in args.overrides):
        raise ConfigError(f"doctor: got {' '.join(args.overrides)} without a recipe to override. Add --config.")
    config = None
    if args.config is not None:
        # What the recipe says comes first, the placeholders where it says nothing.
        config = load(TrainConfig, args.config, [*missing_keys(args.config), *args.overrides])
    told = [word.partition("=")[2] for word in args.overrides if word.startswith("run=")]
    run = Path(expanded(told[-1])) if told else config.run if config is not None and config.run != Path(".") else None
    place = detect(os.environ)
    report: Report = examine(config, run) if place.rank == 0 else {}
    if place.size > 1:
        world = join()
        report["between ranks"] = fabric.look(world)
        finish()
    if place.rank != 0:
        return 0
    print(screen(report), flush=True)
    if args.fix:
        print("\n".join(["to mend what can be mended:", *(fixes(report) or ["# nothing"])]), flush=True)
    if args.json is not None:
        tree = {section: [asdict(finding) for finding in found] for section, found in report.items()}
        write_file(args.json, (json.dumps(tree, indent=1) + "\n").encode())
    return 0


def missing_keys(path: Path) -> list[str]:
    """The placeholders that a recipe needs."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return []  # Said better by whoever reads it next.
    there = {"run=.": "run" in tree, "data.store=none": "store" in (tree.get("data") or {})}
    return [word for word in PLACEHOLDERS if not there[word]]


if __name__ == "__main__":
    raise SystemExit(run_command(main))
