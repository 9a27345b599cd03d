"""The same figures as torch-fidelity, from the same pictures and the same Inception, whose weights are random.

Runs where torch-fidelity can be imported: it needs torchvision beside the torch that it was built for, so a virtual
environment of its own (docs/evaluate.md).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mvar.evaluate import main as evaluate
from mvar.evaluation.extractors import TorchFidelity

torch_fidelity: Any = pytest.importorskip("torch_fidelity", exc_type=ImportError)

COUNT = 40


class Tensors(Dataset[torch.Tensor]):
    """Pictures as torch-fidelity takes them: uint8 (3, H, W)."""

    def __init__(self, images_NHWC: np.ndarray) -> None:
        self.images = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception with weights that keep the size of what flows through, and classes that differ."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inception, "load_state_dict", lambda self, state: None)
        network = Inception("random", ["2048"], feature_extractor_weights_path=str(path))
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
        elif name == "fc.weight":
            value.normal_(0, 0.5)
    torch.save(network.state_dict(), path)
    return path


def _pictures(seed: int, low: int, high: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(low, high, (COUNT, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def test_figures_agree_to_a_thousandth(weights: Path, tmp_path: Path) -> None:
    samples, real = _pictures(1, 0, 220), _pictures(2, 10, 256)
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    np.savez(tmp_path / "real.npz", arr_0=real)
    places = ["--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "real.npz")]
    places += [
        "--features",
        str(weights),
        "--json",
        str(tmp_path / "ours.json"),
        "--device",
        "cpu",
        "--parts",
        "2",
        "--no-floor",
    ]
    assert evaluate(places) == 0
    ours = json.loads((tmp_path / "ours.json").read_text())["figures"]
    theirs = torch_fidelity.calculate_metrics(
        input1=Tensors(samples),
        input2=Tensors(real),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=1,
        kid_subset_size=COUNT,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        num_workers=0,
        verbose=False,
    )
    pairs = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "inception_score_error": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for our_name, their_name in pairs.items():
        print(our_name, ours[our_name], theirs[their_name])
        assert ours[our_name] == pytest.approx(theirs[their_name], rel=1e-3), our_name
    assert ours["inception_score"] > 1.005 and ours["kid"] > 1e-3, "torch-fidelity sums KID in float32"
    assert ours["sfid"] > 0


def test_spatial_features_are_seven_channels_of_the_layer_that_papers_name(weights: Path) -> None:
    found = TorchFidelity(weights, torch.device("cpu"))(torch.from_numpy(_pictures(3, 0, 255)[:2]), classes=False)
    assert found.spatial_BS is not None and found.spatial_BS.shape == (2, 17 * 17 * 7)
    assert found.features_BF.shape == (2, 2048)
