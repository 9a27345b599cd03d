"""`mvar export`: what a checkpoint holds is what comes out, in one file or several, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvar.checkpoint.partition import KINDS
from mvar.checkpoint.published import published_state_dict
from mvar.checkpoint.weights import Weights, load_weights, open_weights
from mvar.errors import CheckpointError, MvarError, WriteError
from mvar.export import GB, main, write_safetensors
from mvar.model.transformer import MVAR
from mvar.run.names import folder_of
from tests.unit.checkpoint.test_weights import configuration, model_of, write_checkpoint

CONFIG = configuration()
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model() -> MVAR:
    return model_of(CONFIG)


@pytest.fixture
def run(tmp_path: Path, model: MVAR) -> Path:
    """A run with one checkpoint, written by three ranks."""
    write_checkpoint(folder_of(tmp_path / "run/checkpoints", 7), CONFIG, dict.fromkeys(KINDS, model))
    return tmp_path / "run"


def same(state: dict[str, Tensor], model: MVAR) -> bool:
    expected = dict(model.named_parameters())
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_a_checkpoint_becomes_one_file(run: Path, model: MVAR, tmp_path: Path) -> None:
    assert main(["--weights", str(run), "--out", str(tmp_path / "new/w.safetensors")]) == 0
    config, state = load_weights(tmp_path / "new/w.safetensors")
    assert config == CONFIG and same(state, model)
    assert same(load_file(tmp_path / "new/w.safetensors"), model)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_a_checkpoint_becomes_several_files_that_any_reader_can_read(run: Path, model: MVAR, tmp_path: Path) -> None:
    out, size = tmp_path / "d2.v1", sum(parameter.numel() for parameter in model.parameters()) * 4
    limit = size // 4
    assert main(["--weights", str(run), "--out", str(out), "--shard-gb", str(limit / GB)]) == 0
    index = json.loads((out / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(path.name for path in out.iterdir()) == [*files, INDEX] and len(files) >= 4
    assert index["metadata"]["total_size"] == size
    assert all((out / name).stat().st_size < limit + 100_000 for name in files)
    assert same({name: load_file(out / file)[name] for name, file in index["weight_map"].items()}, model)
    config, state = load_weights(out)
    assert config == CONFIG and same(state, model)
    # From there it goes on: to one file, and to the published layout.
    assert main(["--weights", str(out), "--out", str(tmp_path / "one.safetensors")]) == 0
    assert same(load_weights(tmp_path / "one.safetensors")[1], model)
    assert main(["--weights", str(out), "--to", "published", "--out", str(tmp_path / "w.pth")]) == 0
    published = torch.load(tmp_path / "w.pth", weights_only=True)
    expected = published_state_dict(model)
    assert list(published) == list(expected)
    assert all(torch.equal(published[name], expected[name]) for name in expected)


def test_a_small_model_in_a_folder_is_one_file(run: Path, model: MVAR, tmp_path: Path) -> None:
    assert main(["--weights", str(run), "--out", str(tmp_path / "folder")]) == 0
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.safetensors"]
    assert same(load_weights(tmp_path / "folder")[1], model)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_rounded_once(run: Path, model: MVAR, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    assert main(["--weights", str(run), "--dtype", name, "--out", str(tmp_path / "w.safetensors")]) == 0
    raw, read = load_file(tmp_path / "w.safetensors"), load_weights(tmp_path / "w.safetensors")[1]
    for parameter, value in model.named_parameters():
        assert torch.equal(raw[parameter], value.to(dtype))
        assert torch.equal(read[parameter], value.to(dtype).float())


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    weights = Weights(tmp_path, CONFIG, {"a": (2,)}, lambda _: torch.tensor([1.0, 1e5]))
    with pytest.raises(CheckpointError, match=r"a has a value of 1e\+05, too large for fp16"):
        write_safetensors(tmp_path / "w.safetensors", weights, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_the_moving_average_is_exported_on_demand(tmp_path: Path, model: MVAR, run: Path) -> None:
    average = model_of(CONFIG, seed=5)
    folder = write_checkpoint(tmp_path / "with", CONFIG, {"weight": model, "ema": average})
    out = tmp_path / "w.safetensors"
    for flags, expected in (([], model), (["--ema"], average)):
        assert main(["--weights", str(folder), "--out", str(out), *flags]) == 0
        assert same(load_weights(out)[1], expected)
    with pytest.raises(CheckpointError, match="but not 'ema'"):
        main(["--weights", str(run), "--out", str(out), "--ema"])


def test_an_export_is_replaced_and_nothing_else_is(run: Path, model: MVAR, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    for gigabytes in ("1e-4", "5"):  # First many files, then one.
        assert main(["--weights", str(run), "--out", str(out), "--shard-gb", gigabytes]) == 0
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    with pytest.raises(CheckpointError, match="exists and is no export"):
        main(["--weights", str(run), "--out", str(run)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run"]


def test_a_failure_leaves_what_was_there(
    run: Path, model: MVAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = ["folder", "w.safetensors", "w.pth"]
    layouts = {"w.pth": ["--to", "published"]}

    def all_of_them() -> None:
        for place in places:
            main(["--weights", str(run), "--out", str(tmp_path / place), *layouts.get(place, [])])

    all_of_them()
    before = {place: (tmp_path / place).stat().st_mtime_ns for place in places}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for place in places:
        with pytest.raises(WriteError, match="No space left on device"):
            main(["--weights", str(run), "--out", str(tmp_path / place), *layouts.get(place, [])])
    assert {place: (tmp_path / place).stat().st_mtime_ns for place in places} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*places, "run"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "w.pth"], "NAME.safetensors, or a folder"),
        (["--out", "w.safetensors", "--to", "published"], r"ends in \.pth"),
        (["--out", "w.pth", "--to", "published", "--dtype", "bf16"], "the published layout is fp32"),
        (["--out", "w.safetensors", "--shard-gb", "1e-5"], "Name a folder"),
        (["--out", "w.safetensors", "--shard-gb", "0"], "more than 0"),
    ],
)
def test_wrong_use_is_explained(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MvarError, match=words):
        main(["--weights", str(run), *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_with_a_missing_or_foreign_part_says_so(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    main(["--weights", str(run), "--out", str(out), "--shard-gb", "1e-4"])
    first, second = sorted(out.glob("model-*"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"{second.name}: parameter .* is missing"):
        open_weights(out)
    second.unlink()
    with pytest.raises(CheckpointError, match=second.name):
        open_weights(out)


LIMITED = """
import resource, sys
import torch
from mvar import export
from mvar.checkpoint import weights
from mvar.checkpoint.weights import Weights

# Loads everything that is loaded on first use.
spare, shape = 24 * 2**20, (2**20,)
names = [f"p{number}" for number in range(24)]
def source(count):
    return Weights("x", weights.ModelConfig(), {name: shape for name in names[:count]}, lambda n: read(n))
def read(name):
    return torch.full(shape, float(name[1:]))
from pathlib import Path
out = Path(sys.argv[1])
export.write_safetensors(out / "warm", source(2), shard_bytes=2**22)
export._staged(out / "warm.raw", source(2))
held = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")][0] * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + spare, held + spare))
export.write_safetensors(out / "small", source(24), shard_bytes=2**24)
state = export._staged(out / "raw", source(24))
torch.save(state, out / "w.pth")
try:
    everything = [read(name) for name in names]
except RuntimeError:
    print("everything at once does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_DATA")
def test_memory_holds_a_few_parameters_and_never_the_model(tmp_path: Path) -> None:
    """24 parameters of 4 MiB each, in a process that may take 24 MiB more than it has: mapped files do not count."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.stdout == "everything at once does not fit\n", done.stderr
    shards = sorted((tmp_path / "small").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in shards) > 24 * 2**22
    saved = torch.load(tmp_path / "w.pth", weights_only=True, mmap=True)
    assert [float(saved[f"p{number}"][-1]) for number in range(24)] == list(range(24))
    assert float(load_weights(tmp_path / "small")[1]["p17"][5]) == 17
