"""Which arithmetic samples are drawn in, and what calibration says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mvar.config import Precision
from mvar.errors import BackendError
from mvar.sampling.calibrate import calibrate, table
from mvar.sampling.loading import ModelPair
from mvar.sampling.options import SamplingOptions
from mvar.sampling.pictures import Picture
from mvar.sampling.precision import choose
from mvar.testing.tiny_pairs import PYRAMID, write_pair

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def pair_of(folder: Path, **options: Any) -> ModelPair:
    words = write_pair(folder, **options)
    return ModelPair.load(Path(words[1]), Path(words[3]))


@pytest.mark.parametrize(
    ("capability", "trained", "expected"),
    [
        ((9, 0), "bf16", "bf16"),
        ((9, 0), "bf16_autocast", "bf16"),
        ((9, 0), "fp16", "fp16"),
        ((9, 0), "fp32", "fp32"),
        ((9, 0), None, "bf16"),
        ((7, 0), None, "fp16"),
        ((7, 0), "bf16", "fp32"),
        ((7, 0), "fp16", "fp16"),
    ],
)
def test_the_default_on_gpus_is_what_the_weights_were_trained_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], trained: Precision | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose("auto", GPU, trained).way == expected
    assert choose("auto", CPU, trained).way == "fp32"
    assert choose("fp16", CPU, trained).way == "fp16"


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_that_a_cpu_has_no_instructions_for_is_said_to_be_slow(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr("mvar.model.kernels.precision._cpu_multiplies", lambda _dtype: has_bf16)
    chosen = choose("bf16", CPU, None)
    assert chosen.way == "bf16" and chosen.slow is not has_bf16
    assert ("fp32 is faster" in chosen.reason) is not has_bf16
    assert not choose("fp32", CPU, None).slow


def test_tf32_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        choose("tf32", CPU, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        choose("tf32", GPU, None)


@pytest.mark.parametrize("trained", ["bf16_autocast", "fp16", None])
def test_exported_weights_tell_what_they_were_trained_in(tmp_path: Path, trained: Precision | None) -> None:
    assert pair_of(tmp_path, precision=trained).trained == trained


def test_calibration_measures_the_arithmetic_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(tmp_path)
    pictures = [Picture(number % 4, number) for number in range(5)]
    one, several = (calibrate(pair, SamplingOptions(), pictures, 0, CPU, batch) for batch in (5, 2))
    assert [distance.precision for distance in one] == ["bf16", "fp16"]
    for whole, cut in zip(one, several, strict=True):
        assert whole.divergence_S == pytest.approx(cut.divergence_S, rel=1e-2)
        tokens = [side**2 / sum(s**2 for s in PYRAMID) for side in PYRAMID]
        assert whole.differing == pytest.approx(sum(map(lambda a, b: a * b, whole.differing_S, tokens)))
    text = table(one, 5, SamplingOptions())
    assert len(text.splitlines()) == 2 + 2 * len(one)
    # In fp32 itself the distance is none at all.
    monkeypatch.setattr("mvar.sampling.calibrate.PRECISIONS", ("fp32", "fp32"))
    (same,) = calibrate(pair, SamplingOptions(), pictures, 0, CPU, 5)
    assert same.divergence_S == (0.0,) * len(PYRAMID) and same.differing == 0


def test_calibration_shouts_where_a_precision_overflows(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    for name, value in pair.state.items():
        if name.endswith("ffn.fc1.weight"):
            value *= 1e9
    bf16, fp16 = calibrate(pair, SamplingOptions(), [Picture(0, 0)], 0, CPU, 1)
    assert bf16.finite and not fp16.finite
    assert "NOT FINITE" in table([fp16], 1, SamplingOptions())
