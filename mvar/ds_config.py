"""From a DeepSpeed template and a recipe to the configuration DeepSpeed gets.

A template (`ds_configs/*.json`) chooses the ZeRO stage, offloading and bucket sizes. Batch sizes, precision, clipping
and the optimizer come from the recipe. A template may leave those out, say "auto", or repeat the recipe's value; any
other value is an error that names both places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar import shipped
from mvar.config import TrainConfig
from mvar.errors import ConfigError

Tree = dict[str, Any]
AUTO = "auto"
WIDE_SUMS_FROM = 64
"""Ranks from which 16-bit gradients are summed over ranks in fp32, for twice the bytes.

A sum that goes round a ring is rounded once a rank. In bf16 that makes an error of 0.4 % with 8 ranks, twice that of a
single rounding, 0.8 to 3 % with 64 and 2 to 30 % with 512: the more, the more alike the ranks' gradients are.
"""
_REMOVED = {"optimizer": "optim", "scheduler": "optim", "checkpoint": "checkpoint", "amp": "engine.precision"}
"""Sections that a template must not have -> where the recipe decides instead."""


@dataclass(frozen=True)
class BatchSplit:
    """global_batch = ranks x micro_batch x accumulation."""

    global_batch: int
    ranks: int
    micro_batch: int
    accumulation: int

    @classmethod
    def of(cls, global_batch: int, ranks: int, micro_batch: int | None) -> BatchSplit:
        """Raises ConfigError with the nearest split that works."""
        if global_batch % ranks:
            down, up = global_batch // ranks * ranks, -(-global_batch // ranks) * ranks
            near = f"{down} or {up}" if down else f"{up}"
            raise ConfigError(
                f"global_batch {global_batch} cannot be divided over {ranks} ranks. The nearest that can: {near};"
                " or start another number of ranks. (Every rank must hold the same number of images.)"
            )
        share = global_batch // ranks
        micro = micro_batch or share
        if share % micro:
            divisors = [size for size in range(1, share + 1) if share % size == 0]
            nearest = min(divisors, key=lambda size: (abs(size - micro), size))
            raise ConfigError(
                f"engine.micro_batch {micro} does not divide the {share} images that each of {ranks} ranks gets of"
                f" global_batch {global_batch}. The nearest that does: {nearest}."
            )
        return cls(global_batch, ranks, micro, share // micro)


def find_template(path: Path) -> Path:
    """`path` from the working folder, else a shipped one. Raises ConfigError."""
    if found := shipped.find("ds_configs", path):
        return found
    names = ", ".join(shipped.names("ds_configs", "*.json"))
    raise ConfigError(f"engine.ds_config {path}: no such file here ({Path.cwd()}), nor among the shipped: {names}.")


def read_template(path: Path) -> Tree:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_single)
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed template {path}: cannot be read as JSON ({error}).") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("zero_optimization"), dict):
        raise ConfigError(f'DeepSpeed template {path}: expected a "zero_optimization" section with a "stage".')
    if tree["zero_optimization"].get("stage") not in (0, 1, 2, 3):
        got = tree["zero_optimization"].get("stage")
        raise ConfigError(f'DeepSpeed template {path}: "zero_optimization.stage" is {got!r}, expected 0, 1, 2 or 3.')
    return tree


def _single(pairs: list[tuple[str, Any]]) -> Tree:
    """A section whose keys stand once. Raises ValueError."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise ValueError(f'key "{twice[0]}" stands twice in one section; keep one')
    return dict(pairs)


def resolve(config: TrainConfig, split: BatchSplit) -> Tree:
    """The whole DeepSpeed configuration of a run. Raises ConfigError before anything is allocated."""
    path = find_template(config.engine.ds_config)
    template = read_template(path)
    for section, ours in _REMOVED.items():
        if section in template:
            raise ConfigError(f'DeepSpeed template {path}: remove "{section}"; the recipe\'s {ours} decides.')
    stage: int = template["zero_optimization"]["stage"]
    tree = _merge(template, _from_recipe(config, split, stage), path)
    if config.engine.precision in ("bf16", "fp16") and split.ranks >= WIDE_SUMS_FROM:
        tree.setdefault("communication_data_type", "fp32")  # A template may decide otherwise.
    if stage == 0:
        tree["gradient_clipping"] = 0.0  # Without ZeRO, DeepSpeed clips without telling the norm: the engine does it.
    _check_precision(config, tree, stage, path)
    if stage == 3 and config.optim.impl == "apex":
        raise ConfigError(
            f"optim.impl apex with ZeRO stage 3 ({path}): DeepSpeed calls it once for each sub-group of parameters, and"
            " it counts every call as a step, so its bias correction would be wrong. Set optim.impl=torch."
        )
    _place_offload(tree["zero_optimization"], config, path)
    _check_with_deepspeed(tree, path)
    return tree


def _from_recipe(config: TrainConfig, split: BatchSplit, stage: int) -> dict[str, tuple[Any, str]]:
    """Dotted DeepSpeed key -> (value, key of the recipe that decides it)."""
    precision = config.engine.precision
    decided: dict[str, tuple[Any, str]] = {
        "train_batch_size": (split.global_batch, "global_batch"),
        "train_micro_batch_size_per_gpu": (split.micro_batch, "engine.micro_batch"),
        "gradient_accumulation_steps": (split.accumulation, "global_batch / (ranks x engine.micro_batch)"),
        "gradient_clipping": (config.optim.clip_grad, "optim.clip_grad"),
        "bf16.enabled": (precision == "bf16", "engine.precision"),
        "fp16.enabled": (precision == "fp16", "engine.precision"),
        "torch_autocast.enabled": (precision == "bf16_autocast", "engine.precision"),
        "zero_allow_untested_optimizer": (True, "optim.impl"),
        "zero_force_ds_cpu_optimizer": (False, "optim.impl"),
        "steps_per_print": (10**9, "tracking.log_every"),
    }
    if config.engine.activation_checkpointing == "selective":
        # DeepSpeed's own linear layer adds its bias in place, to the very result that is kept for the backward pass.
        decided["zero_optimization.memory_efficient_linear"] = (False, "engine.activation_checkpointing")
    if precision in ("bf16", "fp16"):
        # ZeRO 3 sums gradients over ranks in 16 bits. With nothing to accumulate, keeping them so loses nothing.
        alone = stage == 3 and split.accumulation == 1
        decided["data_types.grad_accum_dtype"] = (precision if alone else "fp32", "engine.precision")
    if precision == "bf16_autocast":
        decided["torch_autocast.dtype"] = ("bfloat16", "engine.precision")
        # None: every gradient is summed over ranks in fp32.
        decided["torch_autocast.lower_precision_safe_modules"] = ([], "engine.precision")
    return decided


def _merge(template: Tree, decided: dict[str, tuple[Any, str]], path: Path) -> Tree:
    tree: Tree = json.loads(json.dumps(template))
    for dotted, (value, ours) in decided.items():
        *parents, leaf = dotted.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f'DeepSpeed template {path}: "{parent}" must be a section.')
        given = section.get(leaf, AUTO)
        if given != AUTO and given != value:
            raise ConfigError(
                f'DeepSpeed template {path} says "{dotted}": {json.dumps(given)}, the recipe\'s {ours} asks for'
                f' {json.dumps(value)}. Write "auto" in the template, or make them agree.'
            )
        section[leaf] = value
    return tree


def _check_precision(config: TrainConfig, tree: Tree, stage: int, path: Path) -> None:
    precision = config.engine.precision
    if stage == 0 and precision in ("bf16", "fp16"):
        raise ConfigError(
            f"engine.precision {precision} with ZeRO stage 0 ({path}): DeepSpeed 0.19 has no sound fp32 master weights"
            " there. Use ds_configs/zero1.json, which costs nothing more, or engine.precision=bf16_autocast."
        )
    if precision == "fp16" and (tree.get("fp16") or {}).get("loss_scale", 0) == 1:
        raise ConfigError(
            f'engine.precision fp16 without loss scaling ({path}: "fp16.loss_scale": 1): small gradients would vanish.'
            " Leave the key out for dynamic scaling, or give a fixed scale such as 1024."
        )


def _place_offload(zero: Tree, config: TrainConfig, path: Path) -> None:
    """Fill in and check the folder of what goes to disk."""
    for section in ("offload_optimizer", "offload_param"):
        place = zero.get(section)
        if not isinstance(place, dict) or place.get("device") != "nvme":
            continue
        folder = config.engine.offload_folder
        given = place.get("nvme_path", AUTO)
        if given == AUTO and folder is None:
            raise ConfigError(
                f'DeepSpeed template {path} keeps "{section}" on disk: set engine.offload_folder to a folder on a fast'
                " local disk."
            )
        if given != AUTO and folder is not None and Path(given) != folder:
            raise ConfigError(
                f'DeepSpeed template {path} says "{section}.nvme_path": {given!r}, the recipe\'s engine.offload_folder'
                f' {str(folder)!r}. Write "auto" in the template, or make them agree.'
            )
        target = Path(folder if given == AUTO and folder is not None else given)
        if not target.is_dir():
            raise ConfigError(f"engine.offload_folder {target}: no such folder. Make it, on a fast local disk.")
        place["nvme_path"] = str(target)


def _check_with_deepspeed(tree: Tree, path: Path) -> None:
    """DeepSpeed's own check of the ZeRO section, as one of our errors."""
    import pydantic
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**tree["zero_optimization"])
    except (pydantic.ValidationError, ValueError, AssertionError) as error:
        raise ConfigError(f'DeepSpeed template {path}: "zero_optimization" is wrong: {error}') from None


def offloads(tree: Tree) -> Iterator[tuple[str, str]]:
    """(section, device) of what a resolved configuration keeps off the accelerator."""
    for section in ("offload_optimizer", "offload_param"):
        device = (tree["zero_optimization"].get(section) or {}).get("device", "none")
        if device != "none":
            yield section, device
