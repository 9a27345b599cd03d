"""The benchmark of a GPU, rehearsed on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_context import Context, Scale
from benchmarks.gpu_profile import profile_calls
from benchmarks.harness import Report


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


def test_a_training_tells_what_its_time_goes_into(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path, traces = tmp_path / "gpu.json", tmp_path / "traces"
    words = ["--tiny", "--only", "train_d16", "--traces", str(traces), "--json", str(path), "--limit-s", "1000"]
    assert gpu.main(words) == 0
    found = json.loads(path.read_text())
    assert found["figures"]["train_d16_late_step_ms"] > 0
    assert "train_d16_gpu_busy" not in found["figures"], "there is no GPU to be busy"
    profile = found["context"]["train_d16_profile"]
    phases = {row["name"]: row["ms"] for row in profile["host_phases"]}
    assert {"batch", "forward", "backward", "update", "result"} <= phases.keys()
    assert sum(phases.values()) == pytest.approx(profile["step_ms"], rel=1e-3)
    assert found["context"]["train_d16_host"]["host_functions"]
    assert (traces / "train_d16_profile.json.gz").exists()
    assert "the trace has no device in it" in capfd.readouterr().out


def test_a_profile_that_fails_costs_no_figure(tmp_path: Path) -> None:
    context = Context(Scale(tiny=True), torch.device("cpu"), Report("gpu"), {}, tmp_path / "part.json")
    context.add("sample_d16_imgs_per_s", 1.0)

    def draw() -> None:
        raise RuntimeError("no memory")

    profile_calls(context, "sample_d16", draw)
    found = json.loads((tmp_path / "part.json").read_text())
    assert found["figures"] == {"sample_d16_imgs_per_s": 1.0}
    assert "no memory" in found["context"]["sample_d16_profile_error"]
