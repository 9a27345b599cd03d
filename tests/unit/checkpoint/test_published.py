"""The published layout: read with the geometry in its shapes, written back name by name."""

from pathlib import Path

import pytest
import torch

from mvar.checkpoint.published import published_state_dict, read_published, write_published
from mvar.checkpoint.weights import load_weights
from mvar.config import ModelConfig
from mvar.errors import CheckpointError
from mvar.export import main as export
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from tests.exports import save_weights
from tests.golden import golden


def _model(**options: bool) -> tuple[MVAR, ModelConfig]:
    config = ModelConfig(
        depth=2, width=128, heads=2, num_classes=5, patch_nums=(1, 2, 3), vocab_size=16, latent_channels=4, **options
    )
    model = MVAR.from_config(config, num_classes=5)
    init_weights_(model, seed=1)
    return model, config


@pytest.mark.parametrize("options", [{}, {"attn_l2_norm": False}, {"shared_conditioning": True}])
def test_geometry_and_weights_survive_the_published_layout(tmp_path: Path, options: dict[str, bool]) -> None:
    model, config = _model(**options)
    write_published(tmp_path / "m.pth", published_state_dict(model))
    read, state = read_published(tmp_path / "m.pth")
    assert read == config
    assert state.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(state[name], value) for name, value in model.named_parameters())


def test_a_training_checkpoint_with_nested_weights_is_read(tmp_path: Path) -> None:
    model, config = _model()
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": published_state_dict(model)}}, tmp_path / "m.pth")
    assert read_published(tmp_path / "m.pth")[0] == config


def test_golden_state_is_read_with_its_geometry(tmp_path: Path) -> None:
    state = golden("mvar_tiny", "state.safetensors")
    write_published(tmp_path / "m.pth", state)
    config, _ = read_published(tmp_path / "m.pth")
    assert (config.depth, config.width, config.heads, config.num_classes) == (2, 128, 2, 10)
    assert config.patch_nums == (1, 2, 3, 4)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save({"pos_1LC": Path("x")}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="refused"):
        read_published(tmp_path / "m.pth")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 broken"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.pth"):
        read_published(tmp_path / "m.pth")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="holds no M-VAR weights"):
        read_published(tmp_path / "m.pth")


def test_export_there_and_back_keeps_every_bit(tmp_path: Path) -> None:
    model, config = _model()
    ours, published, again_ours = (tmp_path / name for name in ("a.safetensors", "b.pth", "c.safetensors"))
    save_weights(ours, config, model.state_dict())
    assert export(["--weights", str(ours), "--to", "published", "--out", str(published)]) == 0
    assert export(["--weights", str(published), "--to", "safetensors", "--out", str(again_ours)]) == 0
    again, state = load_weights(again_ours)
    assert again == config
    assert all(torch.equal(state[name], value) for name, value in model.named_parameters())
