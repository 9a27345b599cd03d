"""The saved state of a tokenizer's training: one safetensors file, and the one before it.

    state.safetensors          the newest: weights, their averages, moments, the discriminator's; metadata `mvar` with
                               the step, what may not change in a training, and a digest over all tensors
    state-before.safetensors   the one before, in case the newest is damaged

Each is complete or absent, whatever kills the process.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mvar.errors import CheckpointError
from mvar.files.disk import keep_beside, remove_stale, write_file
from mvar.log import log
from mvar.tokenizer.files import digest_of

FORMAT = 2
IMAGES = "images"
"""Key of the images' fingerprint in what may not change."""


@dataclass(frozen=True)
class TokenizerTrainingState:
    """Float32 tensors on the CPU by name, steps done, and what may not change when it is taken up."""

    step: int
    tensors: dict[str, Tensor]
    identity: dict[str, Any]

    def require_same(self, path: Path, identity: Mapping[str, Any], free: Collection[str] = ()) -> None:
        """Raises CheckpointError that names what differs from the training it belongs to, but for the keys `free`."""
        keys = sorted((self.identity.keys() | identity.keys()) - set(free))
        wrong = [key for key in keys if self.identity.get(key) != identity.get(key)]
        if wrong:
            changed = "; ".join(f"{key}: {self.identity.get(key)!r} then, {identity.get(key)!r} now" for key in wrong)
            way = " If they changed on purpose, other_images=true goes on with them." if wrong == [IMAGES] else ""
            raise CheckpointError(
                f"training state {path}: it belongs to another training ({changed}). Give another out=..."
                f" folder, or the settings it was started with.{way}"
            )


class StateFile:
    """The saved states of one training."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.safetensors"
        self.before = folder / "state-before.safetensors"
        self._newest_is_damaged = False

    def exists(self) -> bool:
        return self.path.exists() or self.before.exists()

    def write(self, state: TokenizerTrainingState) -> None:
        """Make `state` the newest one; what was the newest becomes the one before. Raises WriteError."""
        header = {
            "kind": "tokenizer-training",
            "format": FORMAT,
            "step": state.step,
            "identity": state.identity,
            "digest": digest_of(state.tensors),
        }
        data = safetensors.torch.save(state.tensors, {"mvar": json.dumps(header, sort_keys=True)})
        self._keep_newest()
        write_file(self.path, data)

    def read(self) -> TokenizerTrainingState:
        """The newest state that is whole; one that is damaged is told of. Raises CheckpointError."""
        try:
            return _read(self.path)
        except CheckpointError as newest:
            if not self.before.exists():
                raise
            state = _read(self.before)
            self._newest_is_damaged = True
            log.warning("%s Going on from the one before it, %s, step %d.", newest, self.before.name, state.step)
            return state

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half-written. Only for who holds the folder."""
        remove_stale(self.path.parent, stale_after_s=0)

    def _keep_newest(self) -> None:
        """A second name for the newest file, so that at no moment there is none; not if `read` found it damaged."""
        if self._newest_is_damaged or not self.path.exists():
            self._newest_is_damaged = False
            return
        keep_beside(self.path, self.before)


def _read(path: Path) -> TokenizerTrainingState:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("mvar", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if header.get("kind") != "tokenizer-training" or header.get("format") != FORMAT:
            raise ValueError("not the state of a tokenizer's training, or of another version of mvar")
        if header["digest"] != digest_of(tensors):
            raise ValueError("its contents do not match their digest")
        return TokenizerTrainingState(int(header["step"]), tensors, dict(header["identity"]))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"training state {path}: damaged ({error}). Remove it to start again, or put back a whole copy."
        ) from None
