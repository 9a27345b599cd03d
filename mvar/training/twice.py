"""One micro-batch's loss and gradient computed twice: a machine in order gives the same bits.

Kernels that add in whatever order their threads come do not, so on GPUs this needs `engine.deterministic`.
"""

from __future__ import annotations

import torch

from mvar.checkpoint.bits import hashes_of
from mvar.config import TrainConfig
from mvar.data.stream import Batch
from mvar.errors import ConfigError
from mvar.training.engine import Engine


def require_repeatable(config: TrainConfig, device: torch.device) -> None:
    """Raises ConfigError where two computations may differ without anything being wrong."""
    if config.trust.verify_every and device.type == "cuda" and not config.engine.deterministic:
        raise ConfigError(
            f"trust.verify_every={config.trust.verify_every}: computing twice gives the same bits on GPUs only with"
            " engine.deterministic=true. Set it, or trust.verify_every=0 (`mvar verify-step` needs neither)."
        )


def difference(engine: Engine, step: int, batch: Batch) -> str | None:
    """What of this rank's two computations differs, in words; None if no bit does. All ranks together."""
    names = ["the loss", *engine.weights]
    first, second = _bits(engine, step, batch), _bits(engine, step, batch)
    differing = [name for name, same in zip(names, (first == second).tolist(), strict=True) if not same]
    if not differing:
        return None
    what = [name if name == names[0] else f"the gradient of {name}" for name in differing]
    return f"{len(differing)} of {len(names)} results: {', '.join(what[:3])}{' ...' * (len(what) > 3)}"


def _bits(engine: Engine, step: int, batch: Batch) -> torch.Tensor:
    loss, gradients = engine.differentiate(step, batch)
    return hashes_of([loss, *gradients])
