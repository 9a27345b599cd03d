"""Beginning from weights: the same pyramid gives the same model, another one sensible values, other models an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar.checkpoint.loading import CheckpointReader
from mvar.checkpoint.partition import KINDS
from mvar.checkpoint.published import published_state_dict, write_published
from mvar.checkpoint.record import RECORD, CheckpointRecord, Progress
from mvar.checkpoint.tensors import write_tensors
from mvar.checkpoint.weights import fitted, initial_values, load_weights, open_weights
from mvar.config import ModelConfig, TrainConfig
from mvar.errors import CheckpointError
from mvar.files.disk import synced
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from mvar.run.names import folder_of
from mvar.scales import PATCH_NUMS_256, PATCH_NUMS_512, ScalePyramid
from tests.exports import save_weights

SIDES, WIDE_SIDES = (1, 2, 4), (1, 3, 8)


def configuration(**changes: Any) -> ModelConfig:
    tree: dict[str, Any] = {"depth": 2, "width": 64, "heads": 1, "num_classes": 5, "patch_nums": SIDES}
    return ModelConfig(**tree | {"vocab_size": 16, "latent_channels": 4} | changes)


def model_of(config: ModelConfig, seed: int = 1) -> MVAR:
    assert config.num_classes is not None
    model = MVAR.from_config(config, num_classes=config.num_classes)
    init_weights_(model, seed=seed)
    with torch.no_grad():  # Embeddings that depend on the place, so that mixed-up ones show.
        for parameter in model.parameters():
            parameter += torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape)
    return model


def write_checkpoint(folder: Path, config: ModelConfig, kinds: dict[str, MVAR], ranks: int = 3) -> Path:
    """A checkpoint as `ranks` ranks write it, each parameter cut into equal runs. `kinds`: whose values to write."""
    folder.mkdir(parents=True)
    run = TrainConfig.model_validate({"run": "r", "data": {"store": "s"}, "model": config.model_dump()})
    shapes = {name: tuple(value.shape) for name, value in kinds["weight"].named_parameters()}
    files, pieces = {}, {}
    for rank in range(ranks):
        name, layout, values = f"rank-{rank:05d}.safetensors", [], []
        for parameter in shapes:
            for kind, model in kinds.items():
                flat = dict(model.named_parameters())[parameter].detach().flatten()
                start, stop = len(flat) * rank // ranks, len(flat) * (rank + 1) // ranks
                if stop > start:
                    layout.append((f"{kind}/{parameter}", (stop - start,)))
                    values.append(flat[start:stop])
                    pieces.setdefault(parameter, {})[name] = (name, start, stop)
        with synced(folder / name) as file:
            files[name] = write_tensors(file, layout, values, {})
    record = CheckpointRecord(
        format_version=1,
        progress=Progress(7, 56, 7),
        config=run.model_dump(mode="json"),
        model=config.model_dump(mode="json"),
        store="0" * 64,
        world_size=ranks,
        zero_stage=2,
        kinds=tuple(kinds),
        shapes=shapes,
        pieces={name: list(spans.values()) for name, spans in pieces.items()},
        files=files,
        versions={"torch": "2"},
    )
    (folder / RECORD).write_text(record.text())
    return folder


def logits(model: MVAR) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = model.pyramid.total - model.pyramid.lengths[0]
    x_BLC = torch.randn(2, tokens, model.latent_channels, generator=generator)
    with torch.no_grad():
        return model(torch.tensor([0, 4]), x_BLC)


def fill(model: MVAR, values: Callable[[str, tuple[int, ...]], Tensor]) -> MVAR:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, tuple(parameter.shape)))
    return model


def write(place: Path, how: str, model: MVAR, config: ModelConfig) -> Path:
    if how == "export":
        save_weights(place / "w.safetensors", config, model.state_dict())
        return place / "w.safetensors"
    if how == "published":
        write_published(place / "w.pth", published_state_dict(model))
        return place / "w.pth"
    folder = write_checkpoint(folder_of(place / "run/checkpoints", 7), config, {"weight": model})
    return folder if how == "checkpoint" else place / "run"


@pytest.mark.parametrize("how", ["export", "published", "checkpoint", "run"])
def test_the_same_pyramid_gives_the_same_logits(tmp_path: Path, how: str) -> None:
    config = configuration()
    model = model_of(config)
    values = initial_values(write(tmp_path, how, model, config), config)
    again = fill(model_of(config, seed=2), values)
    assert torch.equal(logits(again), logits(model))
    assert all(value.dtype == torch.float32 for value in again.parameters())


@pytest.mark.parametrize("how", ["export", "published"])
def test_a_finer_pyramid_gets_resampled_places_and_everything_else_as_it_was(tmp_path: Path, how: str) -> None:
    config, wide = configuration(), configuration(patch_nums=WIDE_SIDES)
    model = model_of(config)
    values = initial_values(write(tmp_path, how, model, config), wide)
    again = fill(model_of(wide, seed=2), values)
    state, state_wide = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[name], state_wide[name]) for name in state if name != "pos_1LC")
    assert logits(again).isfinite().all()
    pos, pos_wide = model.pos_1LC, again.pos_1LC
    assert pos_wide.shape == (1, 1 + 9 + 64, 64)
    assert torch.equal(pos_wide[:, 0], pos[:, 0])
    assert float(pos_wide.detach().abs().max()) <= 1.2 * float(pos.detach().abs().max())


def plane(side: int) -> Tensor:
    """(side*side, 2): the place of each pixel's centre, as shares of the picture."""
    centre = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(centre, centre, indexing="ij"), dim=-1).reshape(-1, 2)


def test_a_ramp_stays_a_ramp_from_256_to_512_px() -> None:
    old, new = ScalePyramid(PATCH_NUMS_256), ScalePyramid(PATCH_NUMS_512)
    pos = torch.cat([plane(side) * 10 + scale for scale, side in enumerate(PATCH_NUMS_256)]).unsqueeze(0)
    found = fitted("pos_1LC", pos, old, new)
    assert found.shape == (1, 2240, 2)
    for scale, side in enumerate(PATCH_NUMS_512):
        expected = (plane(side) * 10 + scale).view(side, side, 2)
        got = found[0, new.segment(scale)].view(side, side, 2)
        margin = -(-2 * side // PATCH_NUMS_256[scale])  # Beyond the outermost centres there is nothing to go by.
        inner = slice(margin, side - margin)
        torch.testing.assert_close(got[inner, inner], expected[inner, inner], atol=1e-4, rtol=0)
        assert (got[1:, :, 0] - got[:-1, :, 0] > -1e-5).all()
        assert float((got - expected).abs().max()) <= 10 * 0.6 / PATCH_NUMS_256[scale]


def test_scales_find_their_partners_by_relative_size_when_counts_differ() -> None:
    old, new = ScalePyramid((1, 2, 4)), ScalePyramid((2, 3, 6, 8))
    pos = torch.cat([torch.full((side * side,), float(side)) for side in old.patch_nums]).view(1, -1, 1)
    found = fitted("pos_1LC", pos, old, new)
    means = [round(float(found[0, new.segment(scale)].mean()), 4) for scale in range(4)]
    assert means == [1, 1, 2, 4]  # 2/8 is 1/4; 3/8 lies between 1/4 and 2/4: the coarser; 6/8 as well; 8/8 is 4/4.
    levels = torch.arange(3.0).view(3, 1)
    assert fitted("lvl_embed.weight", levels, old, new).flatten().tolist() == [0, 1, 2, 2]
    assert fitted("lvl_embed.weight", levels, old, ScalePyramid((1, 2))).flatten().tolist() == [0, 1]
    assert fitted("pos_start", torch.full((1, 1, 2), 3.0), old, new).tolist() == torch.full((1, 4, 2), 3.0).tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 6}, "num_classes: 5 there, 6 in model"),
        ({"width": 128, "heads": 2}, "width: 64 there, 128 in model"),
        ({"depth": 3}, "depth: 2 there, 3 in model"),
        ({"attn_l2_norm": False}, "attn_l2_norm: True there, False in model"),
        ({"vocab_size": 32}, "vocab_size: 16 there, 32 in model"),
    ],
)
def test_other_models_are_refused_with_what_differs(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    config = configuration()
    path = write(tmp_path, "export", model_of(config), config)
    with pytest.raises(CheckpointError, match=words):
        initial_values(path, configuration(**changes))


def test_parameters_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, read = configuration(), CheckpointReader.read
    asked: list[str] = []

    def counted(reader: CheckpointReader, name: str, kind: str, start: int, stop: int) -> Tensor:
        asked.append(name)
        return read(reader, name, kind, start, stop)

    monkeypatch.setattr(CheckpointReader, "read", counted)
    values = initial_values(write(tmp_path, "run", model_of(config), config), config)
    assert asked == []
    values("head.weight", (16, 64))
    assert asked == ["head.weight"]
    with pytest.raises(CheckpointError, match=r"head\.weight has shape"):
        values("head.weight", (16, 65))
    with pytest.raises(CheckpointError, match=r"no parameter tail\.weight"):
        values("tail.weight", (1,))


def test_a_damaged_checkpoint_is_not_begun_from(tmp_path: Path) -> None:
    config = configuration()
    folder = write(tmp_path, "checkpoint", model_of(config), config)
    file = folder / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="rank-00001"):
        initial_values(folder, config)


def test_a_moving_average_is_read_where_there_is_one(tmp_path: Path) -> None:
    config = configuration()
    weight, average = model_of(config, seed=1), model_of(config, seed=2)
    folder = write_checkpoint(tmp_path / "with", config, {"weight": weight, "exp_avg": weight, "ema": average})
    assert torch.equal(load_weights(folder, kind="ema")[1]["head.weight"], average.head.weight)
    assert torch.equal(load_weights(folder)[1]["head.weight"], weight.head.weight)
    without = write_checkpoint(tmp_path / "without", config, dict.fromkeys(KINDS, weight))
    with pytest.raises(CheckpointError, match="holds weight, exp_avg, exp_avg_sq, but not 'ema'"):
        open_weights(without, kind="ema")
    with pytest.raises(CheckpointError, match="only a checkpoint"):
        open_weights(write(tmp_path, "export", weight, config), kind="ema")
