"""Tokenizer and quantizer files: safetensors that carry their geometry, and the published .pth layout.

A file of ours has one metadata entry, `mvar`: JSON with `kind`, `format`, `geometry` and `digest` (SHA-256 over names,
shapes and bytes of the tensors), so that a flipped bit is noticed when the file is loaded. The bytes of a file are a
pure function of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mvar.errors import MvarError, TokenizerError
from mvar.files import disk
from mvar.files.shapes import differing
from mvar.scales import PATCH_NUMS_256
from mvar.tokenizer.quantizer import Quantizer
from mvar.tokenizer.vqvae import VQVAE

FORMAT = 1
LARGEST = {"channels": 4096, "latent_channels": 4096, "vocab_size": 1 << 20, "res_blocks": 64, "phis": 256}
"""Limits on what a file may claim: a file's header must not make us allocate without bound."""

Kind = Literal["tokenizer", "quantizer"]
FilePath = str | os.PathLike[str]
M = TypeVar("M", VQVAE, Quantizer)


def save_tokenizer(path: FilePath, vqvae: VQVAE) -> None:
    """Write weights and geometry as safetensors. The file is complete or absent. Raises WriteError."""
    _save(Path(path), "tokenizer", vqvae, vqvae.geometry)


def load_tokenizer(path: FilePath, geometry: Mapping[str, Any] | None = None) -> VQVAE:
    """Read a tokenizer: `save_tokenizer`'s file, or the published layout as .pth or .safetensors.

    A published file says nothing of its geometry: what is not in `geometry` (arguments of VQVAE) is inferred from the
    tensors. `geometry` must agree with a file that states its own. Returns a frozen float32 VQVAE in eval mode, on the
    CPU. Raises TokenizerError.
    """
    path = Path(path)
    tensors, header = _read(path, "tokenizer")
    given = dict(geometry or {})
    known = header["geometry"] if header is not None else _inferred(path, tensors, given)
    return _filled(path, _built(path, VQVAE, _agreed(path, known, given)), tensors)


def save_quantizer(path: FilePath, quantizer: Quantizer) -> None:
    """Write a quantizer alone: what the training of a transformer needs of a tokenizer. Atomic, as `save_tokenizer`."""
    _save(Path(path), "quantizer", quantizer, quantizer.geometry)


def load_quantizer(path: FilePath) -> Quantizer:
    """Read a quantizer from its own file or out of a tokenizer file. Frozen, eval mode, CPU. Raises TokenizerError."""
    path = Path(path)
    tensors, header = _read(path, "quantizer")
    if header is None or header["kind"] == "tokenizer":
        return load_tokenizer(path).quantizer
    return _filled(path, _built(path, Quantizer, header["geometry"]), tensors)


def read_weights(path: FilePath, what: str) -> dict[str, Tensor]:
    """Named tensors of a .safetensors or .pth file of anybody's, on the CPU; nothing is unpickled but tensors.

    `what` it is supposed to be begins every message. Raises TokenizerError.
    """
    path = Path(path)
    if not path.is_file():
        raise TokenizerError(f"{what} {path}: not found. Give an existing .safetensors or .pth file.")
    if path.suffix != ".safetensors":
        return _read_pth(path, what)
    return _read_safetensors(path, what)[0]


def sha256_of(path: FilePath) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises TokenizerError if it cannot be read."""
    try:
        return disk.sha256_of(path)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}). Give an existing file.") from None


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- writing


def _save(path: Path, kind: Kind, module: nn.Module, geometry: dict[str, Any]) -> None:
    tensors = {
        name: value.detach().to("cpu", torch.float32).contiguous(memory_format=torch.contiguous_format)
        for name, value in module.state_dict().items()
    }
    header = {"kind": kind, "format": FORMAT, "geometry": geometry, "digest": digest_of(tensors)}
    disk.write_file(path, safetensors.torch.save(tensors, {"mvar": json.dumps(header, sort_keys=True)}))


# ---- reading


def _read(path: Path, kind: Kind) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of a file, and its header if it is one of ours. Raises TokenizerError."""
    if not path.is_file():
        raise TokenizerError(f"{kind} file {path}: not found. Give an existing .safetensors or .pth file.")
    if path.suffix != ".safetensors":
        return _read_pth(path, f"{kind} file"), None
    tensors, entries = _read_safetensors(path, f"{kind} file")
    if "mvar" not in entries:
        return tensors, None
    return tensors, _header(path, kind, entries["mvar"], tensors)


def _read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, entries  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise TokenizerError(_damaged(path, what, f"not readable as safetensors ({error})")) from None


def _header(path: Path, kind: Kind, text: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError:
        raise TokenizerError(_damaged(path, f"{kind} file", "its metadata is not JSON")) from None
    if not isinstance(header, dict) or not isinstance(header.get("geometry"), dict):
        raise TokenizerError(_damaged(path, f"{kind} file", "its metadata states no geometry"))
    if header.get("format") != FORMAT:
        raise TokenizerError(
            f"{kind} file {path}: format {header.get('format')!r}, expected {FORMAT}. Read it with the version of mvar"
            " that wrote it."
        )
    if header.get("kind") not in ("tokenizer", kind):
        raise TokenizerError(
            f"{kind} file {path}: it holds a {header.get('kind')!r}, expected a {kind!r}. Give a {kind} file."
        )
    if header.get("digest") != digest_of(tensors):
        raise TokenizerError(
            _damaged(path, f"{kind} file", "its weights do not match the digest they were written with")
        )
    return header


def _read_pth(path: Path, what: str) -> dict[str, Tensor]:
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TokenizerError(_damaged(path, what, f"not readable as a file of weights ({reason[:200]})")) from None
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise TokenizerError(
            f"{what} {path}: expected a state dict (names and tensors), got something else. Give a file of"
            " weights, such as the published tokenizer, without anything around them."
        )
    return {str(name): value for name, value in tree.items()}


def _damaged(path: Path, what: str, how: str) -> str:
    return f"{what} {path}: damaged: {how}. Copy it again from its source, or train it again."


# ---- geometry


def _inferred(path: Path, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The geometry that the shapes of a published state dict tell. What only the user can know comes from `given`."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or tensors[name].dim() == 0:
            raise TokenizerError(
                f"tokenizer file {path}: not a tokenizer: it lacks {name!r} (first names:"
                f" {sorted(tensors)[:3]}). Give the published VQ-VAE or one written by `mvar train-tokenizer`."
            )
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    channels = shape("encoder.conv_in.weight")[0]
    vocab_size, latent_channels = (*shape("quantize.embedding.weight"), 0)[:2]
    levels = count(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight$")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    known: dict[str, Any] = {
        "channels": channels,
        "latent_channels": latent_channels,
        "vocab_size": vocab_size,
        "channel_mult": [width // max(channels, 1) for width in widths],
        "res_blocks": count(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight$"),
        "phis": count(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight$"),
        "phi_ratio": given.get("phi_ratio", 0.5),
    }
    if "patch_nums" in given:
        return known | {"patch_nums": given["patch_nums"]}
    # The sides of the token maps leave no trace in the tensors but their number.
    hits = tensors.get("quantize.ema_vocab_hit_SV")
    if hits is not None and hits.dim() == 2 and hits.shape[0] != len(PATCH_NUMS_256):
        raise TokenizerError(
            f"tokenizer file {path}: it has {hits.shape[0]} scales, but does not say which; expected"
            f" {len(PATCH_NUMS_256)} as in the published 256 px tokenizer. Pass geometry={{'patch_nums': [...]}}."
        )
    return known | {"patch_nums": list(PATCH_NUMS_256)}


def _agreed(path: Path, known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`known`, if nothing in `given` contradicts it."""
    for key, value in given.items():
        stated = known.get(key)
        if _plain(stated) != _plain(value):
            raise TokenizerError(
                f"tokenizer file {path}: its {key} is {_plain(stated)}, expected {_plain(value)}. Give the tokenizer"
                f" of that geometry, or ask for {key}={_plain(stated)}."
            )
    return dict(known)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _built(path: Path, kind: type[M], geometry: dict[str, Any]) -> M:
    """A module without storage, once the geometry is sane."""
    try:
        too_large = [key for key, limit in LARGEST.items() if geometry.get(key, 0) > limit]
        if too_large or len(geometry.get("channel_mult", ())) > 16 or len(geometry.get("patch_nums", ())) > 1024:
            raise ValueError("larger than any tokenizer")
        with torch.device("meta"):
            return kind(**geometry)
    except (TypeError, ValueError, RuntimeError, MvarError) as error:
        raise TokenizerError(f"tokenizer file {path}: impossible geometry {geometry} ({error}).") from None


def _filled(path: Path, module: M, tensors: dict[str, Tensor]) -> M:
    """Put the tensors in once names and shapes agree. Raises TokenizerError that names the first differences."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    hits = next(name for name in expected if name.endswith("ema_vocab_hit_SV"))
    tensors = {hits: torch.zeros(expected[hits])} | tensors
    differences = differing({name: tuple(value.shape) for name, value in tensors.items()}, expected)
    if differences is not None:
        raise TokenizerError(
            f"tokenizer file {path}: does not fit the geometry {module.geometry}: {differences}."
            " Give the tokenizer of that geometry, or the geometry of that tokenizer."
        )
    damaged = [name for name, value in tensors.items() if not value.sum(dtype=torch.float64).isfinite()]
    if damaged:
        raise TokenizerError(_damaged(path, "tokenizer file", f"{damaged[0]} holds values that are not finite"))
    module.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=True, assign=True)
    return module.eval().requires_grad_(False)
