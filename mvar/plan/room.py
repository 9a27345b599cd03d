"""Whether what a training keeps on disk fits there, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mvar.config import ModelConfig, TrainConfig
from mvar.errors import ConfigError
from mvar.plan.memory import Setup, model_state
from mvar.plan.sizes import Sizes

GIB = 2**30


def require_room(config: TrainConfig, model: ModelConfig, zero: dict[str, Any], ranks: int, local_ranks: int) -> None:
    """Raise ConfigError unless the folder of what ZeRO keeps on NVMe has room for this machine's `local_ranks`.

    `zero`: the resolved section "zero_optimization". Files of an earlier start there are counted as room.
    """
    places = (zero.get(section) or {} for section in ("offload_optimizer", "offload_param"))
    folders = {str(place["nvme_path"]) for place in places if place.get("device") == "nvme"}
    if not folders:
        return
    setup = Setup(int(zero["stage"]), config.engine.precision, ranks, zero)
    need = model_state(Sizes.of(model), setup).disk * local_ranks
    folder = Path(min(folders))
    used = sum(file.stat().st_size for file in folder.glob("zero_stage_3/**/*") if file.is_file())
    free = shutil.disk_usage(folder).free + used
    if free < need:
        raise ConfigError(
            f"engine.offload_folder {folder}: {free / GIB:.1f} GiB are free, {need / GIB:.1f} are needed (16 bytes for"
            f" each parameter of this machine's {local_ranks} of {ranks} ranks). Make room, give another folder, or"
            " use more machines."
        )
