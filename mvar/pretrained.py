"""`from_pretrained` and `save_pretrained` of the model and of the tokenizer.

Both stand in rooms below the one that knows hub folders, so that one is found by its name when it is asked for, as
`mvar.cli` finds its commands.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

P = TypeVar("P", bound="Pretrained")


class Pretrained:
    """Comes out of a folder, or a repository on the Hugging Face Hub, and goes into a folder."""

    @classmethod
    def from_pretrained(cls: type[P], place: str | Path, *, revision: str | None = None) -> P:
        """Read from a hub folder, from anything else that holds one (a run, an export, a published file), or from a
        repository "owner/name" at `revision`, for which huggingface_hub has to be installed.

        On the CPU, in float32 and eval mode. Raises CheckpointError, TokenizerError, BackendError.
        """
        loaded: P = _hub().load(cls, place, revision)
        return loaded

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and config.json into a folder that `from_pretrained` reads: complete or absent.

        What was written so before is replaced. Raises CheckpointError for a folder of anything else, WriteError.
        """
        _hub().save(self, Path(folder))


def _hub() -> Any:
    return import_module("mvar.hub.objects")
