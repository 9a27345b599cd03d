"""`mvar COMMAND ...`: one dispatcher, one way from an error to an exit code.

Exit codes: 0 finished, 2 user error, 75 stopped on purpose with a checkpoint saved (run it again), others are faults.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from mvar.errors import EXIT_USER_ERROR, MvarError
from mvar.log import log, speaking
from mvar.omp import sleep_when_idle

COMMANDS = {
    "train": ("mvar.train", "train the transformer on a code store"),
    "train-tokenizer": ("mvar.train_tokenizer", "train a multi-scale VQ-VAE on images"),
    "tokenize": ("data_prep.tokenize", "images -> shards of codes (one task of an array job)"),
    "finalize": ("data_prep.finalize", "shards -> a complete code store"),
    "verify": ("data_prep.verify", "check a code store"),
    "plan": ("mvar.plan.command", "memory, time and checkpoints of a training, before it is started"),
    "sample": ("mvar.sample", "draw images from a trained model"),
    "merge-samples": ("mvar.merge_samples", "the samples of a job as one .npz"),
    "edit": ("mvar.edit_image", "redraw a part of a picture, its surroundings or its detail; morph classes"),
    "filmstrip": ("mvar.filmstrip", "the same seeds over checkpoints or scales, as a strip and as a film"),
    "evaluate": ("mvar.evaluate", "compare samples with real images: FID, KID, precision, recall, ..."),
    "evaluate-checkpoints": ("mvar.evaluate_checkpoints", "figures of a run's checkpoints, also beside its training"),
    "evaluate-tokenizer": ("mvar.evaluate_tokenizer", "how well pictures survive a tokenizer: rFID, PSNR, SSIM, ..."),
    "evaluate-model": ("mvar.evaluate_model", "loss, bits a token and accuracy on a whole split of a code store"),
    "reference": ("mvar.reference", "statistics of real images, for evaluations to come"),
    "export": ("mvar.export", "write a checkpoint's weights for others"),
    "import-published": ("mvar.import_published", "the published weights as a hub folder, checked"),
    "inspect-checkpoint": ("mvar.inspect_checkpoint", "what is in a checkpoint, and whether it is in order"),
    "scrub": ("mvar.scrub", "read all that is kept of runs and stores, and compare it with its digests"),
    "verify-step": ("mvar.verify_step", "whether the machines of a run compute the same twice"),
    "slurm-scripts": ("mvar.cluster.scripts", "copy the Slurm scripts out of an installed mvar"),
    "status": ("mvar.status", "how a training run is doing, on one screen"),
    "report": ("mvar.report", "draw the curves of a run, or all that is known of it as one page"),
    "gallery": ("mvar.gallery.command", "draw from checkpoints in a browser, compare them, see their curves"),
    "doctor": ("mvar.doctor", "what this machine has, and what `auto` comes to on it"),
    "demo": ("mvar.demo", "the whole job on a few thousand real images"),
}


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call a command's `main`; an MvarError becomes one message on stderr and exit code 2."""
    with speaking():
        try:
            return main(argv)
        except MvarError as error:
            return show_error(error)
        except KeyboardInterrupt:
            return 130


def show_error(error: MvarError) -> int:
    """One message on stderr; the exit code of a user's error."""
    log.error("%s", error)
    return EXIT_USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `mvar` script. Returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print("usage: mvar COMMAND ...   (mvar COMMAND --help)\n")
        print("\n".join(f"  {name:18} {summary}" for name, (_, summary) in COMMANDS.items()))
        return 0
    if args[0] not in COMMANDS:
        with speaking():
            log.error("unknown command %r; commands: %s.", args[0], ", ".join(COMMANDS))
        return EXIT_USER_ERROR
    sleep_when_idle()
    module = import_module(COMMANDS[args[0]][0])
    return run_command(module.main, args[1:])


if __name__ == "__main__":
    raise SystemExit(main())
