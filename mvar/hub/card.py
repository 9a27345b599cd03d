"""The model card: README.md of a hub folder, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from mvar.hub.layout import FIGURES, GRID, PREPROCESSING, TOKENIZER, HubConfig, Preprocessing

UNKNOWN = "unknown"
"""What the Hub calls a licence that nobody has stated."""
_BESIDE = ("_error", "_floor", "_real")
"""Ends of names of what stands beside a figure: its error, and what real images score."""


def model_card(
    name: str,
    config: HubConfig,
    preprocessing: Preprocessing,
    tokenizer: Mapping[str, Any],
    *,
    parameters: int,
    figures: Mapping[str, Any] | None = None,
    with_grid: bool = False,
) -> str:
    """Markdown. `tokenizer`: its geometry; `parameters`: of the model; `figures`: what `mvar evaluate` wrote."""
    front = {
        "license": config.license or UNKNOWN,
        "library_name": "mvar",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["mvar", "image-generation", "class-conditional", "arxiv:2411.10433"],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        "An [M-VAR](https://arxiv.org/abs/2411.10433): class-conditional images, drawn scale by scale, with attention "
        "inside a scale and Mamba-2 across scales.\n",
        *([f"![samples, one class a row]({GRID})\n"] if with_grid else []),
        _use(name, config, preprocessing),
        _facts(config, preprocessing, tokenizer, parameters),
        _images(preprocessing),
        *([_measured(figures)] if figures is not None else []),
        *([_origin(config)] if config.source else []),
        _licence(config),
    ]
    return "\n".join(sections)


def _use(name: str, config: HubConfig, preprocessing: Preprocessing) -> str:
    classes = preprocessing.classes
    labels = list(range(min(2, config.model.num_classes or 1))) if classes is None else list(classes[:2])
    seeds = list(range(len(labels)))
    return f"""## Use

```python
from mvar import MVARPipeline

pipe = MVARPipeline.from_pretrained({json.dumps(name)})  # the path of this folder, or owner/name
images = pipe({labels}, seeds={seeds}).images
images[0].save("sample.png")
```

Needs the package `mvar-imagegen`, without DeepSpeed, which trainings alone use. Weights are safetensors: nothing is
unpickled. An image depends on its class, its seed and the sampling options.
"""


def _facts(config: HubConfig, preprocessing: Preprocessing, tokenizer: Mapping[str, Any], parameters: int) -> str:
    model, sampling = config.model, config.sampling
    shown = {name: sampling[name] for name in ("cfg", "top_k", "top_p") if name in sampling}
    rows = {
        "parameters": f"{parameters:,}",
        "depth, width, heads": f"{model.depth}, {model.resolved_width}, {model.resolved_heads}",
        "L2-normalised attention": "on" if model.attn_l2_norm else "off",
        "classes": f"{model.num_classes:,}" if model.num_classes is not None else "unknown",
        "token maps": ", ".join(f"{side}x{side}" for side in model.patch_nums),
        "images": f"{preprocessing.image_size} x {preprocessing.image_size} px",
        "trained in": config.precision or "unknown",
        "step": f"{config.step:,}" if config.step is not None else "unknown",
        "tokenizer": f"`{TOKENIZER}/`: {tokenizer['vocab_size']:,} words of {tokenizer['latent_channels']} channels",
        "sampling, unless told otherwise": ", ".join(f"{name} {value}" for name, value in shown.items()) or "defaults",
        "written by": f"mvar {config.mvar}",
    }
    return "## The model\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows.items())


def _images(preprocessing: Preprocessing) -> str:
    low, high = preprocessing.value_range
    lines = [f"## Images\n\nRGB, {preprocessing.image_size} px, bytes 0 to 255 as {low:g} to {high:g}."]
    if preprocessing.transform is None:
        lines.append("How they were resized and cut for the training is not known.")
    else:
        told = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in preprocessing.transform.items())
        lines.append(f"For the training they were cut so: {told}.")
    known = "has the classes' names" if preprocessing.classes is not None else "has no names of classes: give numbers"
    return " ".join([*lines, f"[`{PREPROCESSING}`]({PREPROCESSING}) {known}."]) + "\n"


def _plain(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _measured(figures: Mapping[str, Any]) -> str:
    numbers: Mapping[str, float] = figures["figures"]
    rows = ["| figure | samples | +- | real images |", "|---|---|---|---|"]
    for name, value in numbers.items():
        if not name.endswith(_BESIDE):
            stem = name.removesuffix("_samples")
            error, floor, real = (numbers.get(stem + end) for end in _BESIDE)
            cells = (value, error, real if floor is None else floor)
            rows.append(f"| {stem} | {' | '.join('' if cell is None else f'{cell:.4g}' for cell in cells)} |")
    told = json.dumps(figures, indent=1)
    return (
        "## Figures\n\n" + "\n".join(rows) + f"\n\nAs `mvar evaluate` wrote them, with how they were made "
        f"([`{FIGURES}`]({FIGURES})):\n\n```json\n{told}\n```\n"
    )


def _origin(config: HubConfig) -> str:
    rows = "".join(f"| `{name}` | {file.bytes:,} | `{file.sha256}` |\n" for name, file in config.source.items())
    return f"## Where the weights come from\n\n| file | bytes | SHA-256 |\n|---|---|---|\n{rows}"


def _licence(config: HubConfig) -> str:
    if config.license is None:
        return "## License\n\nNot stated: whoever wrote this folder named none. Ask before you use the weights.\n"
    return f"## License\n\n{config.license}\n"
