"""From what a user names to files on this machine: a path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from mvar.checkpoint.weights import SHARD_INDEX
from mvar.errors import BackendError, CheckpointError
from mvar.hub.layout import CONFIG, PREPROCESSING, TOKENIZER
from mvar.paths import expanded

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FILES = [
    "model*.safetensors",
    SHARD_INDEX,
    PREPROCESSING,
    CONFIG,
    f"{TOKENIZER}/{CONFIG}",
    f"{TOKENIZER}/model.safetensors",
]
"""All that loading reads: nothing else of a repository is downloaded, whatever lies in it."""


def local(place: str | Path, revision: str | None = None) -> Path:
    """The path itself where it exists; otherwise a copy of the repository "owner/name".

    Raises BackendError where huggingface_hub is needed and missing, CheckpointError where nothing is found.
    """
    path = Path(expanded(str(place)))
    if path.exists():
        return path
    if isinstance(place, Path) or not _REPOSITORY.fullmatch(place):
        raise CheckpointError(
            f"{place}: no such file or folder. Give a folder that `mvar export --to hub` wrote, a run, a file of "
            "weights, or the name of a repository (owner/name)."
        )
    return _downloaded(place, revision)


def _downloaded(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BackendError(
            f"{name}: no such file or folder here. If it is a repository on the Hugging Face Hub: that needs "
            "huggingface_hub (pip install huggingface_hub, the extra `hub`)."
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:  # All errors of the library and of the network are one of these.
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{name}: no such file or folder here, and no repository that could be read ({reason}). Check the name; "
            "without network give a folder."
        ) from None
