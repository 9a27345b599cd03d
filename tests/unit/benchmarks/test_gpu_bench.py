"""The benchmark of a GPU, rehearsed on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_skips(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu.main([]) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "gpu.json"
    words = ["--tiny", "--only", "train_d24,sample_var30", "--set", "engine.nonsense=1", "--json", str(path)]
    assert gpu.main([*words, "--limit-s", "1000"]) == 1
    found = json.loads(path.read_text())
    assert found["figures"]["sample_var30_imgs_per_s"] > 0
    assert "nonsense" in found["context"]["problems"]["train_d24"]
    assert "train_d24 FAILED" in capfd.readouterr().out
