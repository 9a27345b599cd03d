"""Model and tokenizer as they are drawn with: checked against each other, on their device, in their precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mvar.checkpoint.partition import EMA, WEIGHT
from mvar.checkpoint.weights import open_weights
from mvar.config import ModelConfig, Precision
from mvar.errors import BackendError, CheckpointError, ConfigError
from mvar.model.transformer import MVAR
from mvar.sampling.precision import DTYPES, SamplePrecision
from mvar.sampling.sampler import check_geometry
from mvar.tokenizer.files import load_tokenizer
from mvar.tokenizer.vqvae import VQVAE


@dataclass(frozen=True)
class ModelPair:
    """What is drawn from: float32 weights on the CPU, and the tokenizer.

    `where`: the file or checkpoint folder that was read. `trained`: the arithmetic of the training, if that is known.
    """

    where: Path
    config: ModelConfig
    num_classes: int
    state: dict[str, Tensor]
    tokenizer: VQVAE
    trained: Precision | None
    step: int | None = None
    """Of the checkpoint, if it is one."""

    @classmethod
    def load(cls, weights: Path, tokenizer: Path, *, step: int | None = None, ema: bool = False) -> ModelPair:
        """Raises CheckpointError, TokenizerError, ConfigError: they cannot be read, or are no pair."""
        vqvae = load_tokenizer(tokenizer).eval()
        opened = open_weights(weights, step=step, kind=EMA if ema else WEIGHT)
        config = opened.config
        if config.num_classes is None:
            raise ConfigError(f"--weights {weights}: its configuration has no number of classes.")
        source = cls(opened.path, config, config.num_classes, {}, vqvae, opened.precision, opened.step)
        check_geometry(source._empty(), vqvae.quantizer)
        source.state.update((name, opened.read(name)) for name in opened.shapes)
        return source

    def model(self, precision: SamplePrecision, device: torch.device) -> MVAR:
        """A model of its own in that precision. Raises CheckpointError."""
        model = self._empty()
        try:
            model.load_state_dict(dict(self.state), assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"--weights {self.where}: not the weights of the model it describes. {error}"
            ) from None
        return model.requires_grad_(False).store_matmuls_(DTYPES[precision]).to(device).eval()

    def _empty(self) -> MVAR:
        with torch.device("meta"):
            return MVAR.from_config(self.config, num_classes=self.num_classes)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises ConfigError or BackendError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: unknown. Use auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu or auto.")
    return device
