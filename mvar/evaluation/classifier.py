"""A small image classifier: judges whether samples show their class, and lends its features to the distances.

It stands in where no pretrained extractor fits the images (digits, product photos, emoji at 32 px). Its distances
compare runs on the same data; they are not the FID of papers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save
from torch import Tensor, nn

from mvar.errors import MvarError
from mvar.files.disk import write_file
from mvar.images.arrays import Bytes, from_uint8


class Classifier(nn.Module):
    """Four stages of convolution; (B, 3, H, W) float32 in [-1, 1] -> logits (B, K), features (B, 128)."""

    def __init__(self, num_classes: int, channels: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in zip((3, *channels[:-1]), channels, strict=True):
            stages += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            stages += [nn.MaxPool2d(2)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels[-1], num_classes)

    def features(self, images_BCHW: Tensor) -> Tensor:
        pooled: Tensor = self.stages(images_BCHW).mean(dim=(2, 3))
        return pooled

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images_BCHW))
        return logits


def fit(
    images_BHWC: Bytes,
    labels_B: Tensor,
    num_classes: int,
    *,
    epochs: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train on uint8 images and int64 labels, shifted by up to 2 px. The same seed gives the same weights on a CPU."""
    torch.manual_seed(seed)
    model = Classifier(num_classes).to(device)
    batch = 64
    steps = epochs * max(1, len(labels_B) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels_B), generator=generator)
    for step in range(steps):
        start = step * batch % max(1, len(order) - batch + 1)
        if start < batch:
            order = order[torch.randperm(len(order), generator=generator)]
        chosen = order[start : start + batch]
        images = from_uint8(images_BHWC[chosen.numpy()]).to(device).contiguous(memory_format=torch.channels_last)
        dy, dx = (int(torch.randint(-2, 3, (), generator=generator)) for _ in range(2))
        loss = F.cross_entropy(
            model(images.roll((dy, dx), dims=(2, 3))), labels_B[chosen].to(device), label_smoothing=0.05
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: Classifier, images_BHWC: Bytes, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Class probabilities (B, K) and features (B, 128) of uint8 images (B, H, W, 3), float32, on the CPU."""
    model.eval()
    device = model.head.weight.device
    blocks = [images_BHWC[begin : begin + batch] for begin in range(0, len(images_BHWC), batch)]
    features = torch.cat([model.features(from_uint8(block).to(device)) for block in blocks])
    return model.head(features).softmax(dim=1).cpu(), features.cpu()


def save_classifier(path: Path, model: Classifier) -> None:
    """Write weights as safetensors; the number of classes is the head's."""
    write_file(path, save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}))


def load_classifier(path: Path, num_classes: int) -> Classifier:
    """Read weights written by `save_classifier`. Raises MvarError where the file does not fit."""
    model = Classifier(num_classes)
    try:
        load_model(model, str(path))
    except Exception as error:
        raise MvarError(
            f"classifier {path}: not a classifier of {num_classes} classes ({error}). Delete it to train it anew."
        ) from None
    return model.eval()
