"""`mvar evaluate` and `mvar reference` as papers use them, with a small TorchScript file in Inception's place."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.finalize import finalize
from data_prep.job import TokenizeConfig
from data_prep.tokenize import tokenize
from mvar.cli import run_command
from mvar.evaluate import main as evaluate
from mvar.evaluation.fidelity import frechet_distance, inception_score, kernel_distance, precision_recall
from mvar.images.arrays import Bytes, save_png
from mvar.images.sources import ImageFolder
from mvar.images.views import centre_view
from mvar.reference import main as reference
from mvar.settings import load
from mvar.testing.extractors import write_extractor
from tests.stores import SIZE_PX, tiny_tokenizer

Run = Callable[..., dict[str, Any]]


def noise(count: int, seed: int, *, high: int = 256, size: int = SIZE_PX) -> Bytes:
    return np.random.default_rng(seed).integers(0, high, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images in train/ and val/ (one of train damaged), a store of them, samples, and an extractor."""
    root = tmp_path_factory.mktemp("figures")
    for split, count in (("train", 40), ("val", 25)):
        for label, name in enumerate(("cat", "dog")):
            for number, image in enumerate(noise(count, 10 * label + count, size=22)):
                save_png(root / f"images/{split}/{name}/{number:03}.png", image)
    damaged = root / "images/train/cat/007.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    for number, image in enumerate(noise(60, 3, high=220)):
        save_png(root / f"samples/{number % 2}/{number:05d}.png", image)
    drawn = {"cfg": 2.0, "top_k": 900, "top_p": 0.96, "smooth": False, "seed": 1, "weights": "ab" * 32, "step": 40}
    (root / "samples/sample.json").write_text(json.dumps(drawn))
    write_extractor(root / "small.pt")
    keys = [f"source={root}/images", f"tokenizer={tiny_tokenizer(root / 'tokenizer.safetensors')}"]
    keys += [f"store={root}/codes", "views.resize=1.25", "workers=0", "device=cpu", "threads=1"]
    tokenize(load(TokenizeConfig, None, keys), skip_bad=1)
    finalize(root / "codes")
    return root


def arguments(root: Path, *more: object) -> list[str]:
    return [*map(str, ("--samples", root / "samples", "--features", root / "small.pt", "--device", "cpu", *more))]


def measured(root: Path, *more: object) -> dict[str, Any]:
    out = root / "out.json"
    assert evaluate(arguments(root, "--json", out, *more)) == 0
    tree: dict[str, Any] = json.loads(out.read_text())
    return tree


def refused(root: Path, capsys: pytest.CaptureFixture[str], *more: object) -> str:
    capsys.readouterr()
    assert run_command(evaluate, arguments(root, *more)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "WARNING" not in line]
    assert len(said) == 1, said
    return said[0]


def test_figures_of_a_store_are_those_of_its_views_by_hand(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = root / "kept.npz"
    places = ("--store", root / "codes", "--images", root / "images", "--reference", kept)
    first = measured(root, *places)
    screen = capsys.readouterr().out

    folder, network = ImageFolder(root / "images"), torch.jit.load(str(root / "small.pt"))
    items = {split: list(own) for split, own in folder.splits.items()}
    items["train"] = [item for item in items["train"] if item.key != "cat/007"]
    assert len(items["train"]) == 79
    views = {s: np.stack([centre_view(folder.reader(i.path), SIZE_PX, 1.25) for i in own]) for s, own in items.items()}
    files = sorted((root / "samples").glob("*/*.png"))
    views["samples"] = np.stack([centre_view(folder.reader(path), SIZE_PX, 1.0) for path in files])
    pixels = {name: torch.from_numpy(array).permute(0, 3, 1, 2) for name, array in views.items()}
    features = {name: network(own, return_features=True) for name, own in pixels.items()}
    figures = first["figures"]
    overlap = precision_recall(features["samples"], features["train"])
    assert figures["fd"] == pytest.approx(frechet_distance(features["samples"], features["train"]), rel=1e-6)
    assert figures["kid"] == pytest.approx(kernel_distance(features["samples"], features["train"]), rel=1e-5)
    assert (figures["precision"], figures["recall"]) == (overlap.precision, overlap.recall)
    assert figures["fd_floor"] == pytest.approx(frechet_distance(features["val"], features["train"]), rel=1e-6)
    assert figures["fd"] > figures["fd_floor"] and 0 < figures["fd_error"] < figures["fd"]
    probabilities = network(pixels["samples"], no_output_bias=True)[np.random.RandomState(2020).permutation(60)]
    scores = [inception_score(part) for part in probabilities.split(6)]
    assert figures["class_score"] == pytest.approx(float(np.mean(scores)), rel=1e-6)

    context = first["context"]
    assert context["reference"]["made_of"]["left_out"] == 1 and context["reference"]["images"] == 79
    assert context["drawn_with"]["cfg"] == 2.0 and context["samples_per_class"] == [30, 30]
    for told in ("cfg 2.0 (published 1.5)", "60 samples, papers draw 50,000", "79 images", "small.pt", "ab" * 6):
        assert told in screen, told
    assert "FID" not in screen.split("!")[0], "only Inception's features may be called so"

    (root / "images").rename(root / "moved")
    try:
        again = measured(root, "--reference", kept)
    finally:
        (root / "moved").rename(root / "images")
    assert again["figures"] == figures and again["context"]["reference_sha256"] == context["reference_sha256"]


def test_adm_batches_with_images_with_statistics_and_with_both(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, more = noise(30, 5), noise(300, 6)
    network = torch.jit.load(str(root / "small.pt"))
    all_features = network(torch.from_numpy(more).permute(0, 3, 1, 2), return_features=True).double()
    statistics = {"mu": all_features.mean(dim=0).numpy(), "sigma": torch.cov(all_features.T).numpy()}
    np.savez(root / "images.npz", arr_0=real)
    np.savez(root / "statistics.npz", **statistics)
    np.savez(root / "both.npz", arr_0=real, **statistics)
    images, alone, both = (measured(root, "--reference", root / f"{n}.npz") for n in ("images", "statistics", "both"))
    assert set(alone["figures"]) == {"fd", "fd_error", "class_score", "class_score_error"}
    assert both["figures"]["fd"] == pytest.approx(alone["figures"]["fd"], rel=1e-9) != images["figures"]["fd"]
    for name in ("kid", "precision", "recall"):
        assert both["figures"][name] == images["figures"][name]
    assert both["figures"]["fd_floor"] > 0
    assert "which network made them" in " ".join(alone["context"]["warnings"])

    kept = list(root.glob("images.*.features.npz"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert measured(root, "--reference", root / "images.npz")["figures"] == images["figures"]
    assert kept[0].stat().st_mtime_ns == before, "features are read where they are kept"
    kept[0].write_bytes(kept[0].read_bytes()[:500])
    assert measured(root, "--reference", root / "images.npz")["figures"] == images["figures"]
    assert kept[0].stat().st_size > 500, "a damaged copy is made anew"
    np.savez(root / "images.npz", arr_0=more)
    assert measured(root, "--reference", root / "images.npz")["figures"]["kid"] != images["figures"]["kid"]


def test_a_reference_made_before_gives_the_same_figures(root: Path) -> None:
    where = ["--store", str(root / "codes"), "--images", str(root / "images"), "--device", "cpu"]
    assert reference([*where, "--features", str(root / "small.pt"), "--out", str(root / "made.npz")]) == 0
    made = measured(root, "--reference", root / "made.npz")
    at_once = measured(root, "--store", root / "codes", "--images", root / "images")
    assert made["figures"] == at_once["figures"]


def test_samples_as_npz_score_the_same_and_class_order_does_not_matter_to_distances(root: Path) -> None:
    places = ("--reference", root / "made.npz")
    if not (root / "made.npz").exists():
        test_a_reference_made_before_gives_the_same_figures(root)
    files = sorted((root / "samples").glob("*/*.png"), key=lambda path: path.name)
    folder = ImageFolder(root / "images")
    np.savez(root / "drawn.npz", arr_0=np.stack([np.asarray(folder.reader(path)) for path in files]))
    out = root / "npz.json"
    command = ["--samples", str(root / "drawn.npz"), "--features", str(root / "small.pt"), "--json", str(out)]
    assert evaluate([*command, *map(str, places)]) == 0
    ours, theirs = measured(root, *places)["figures"], json.loads(out.read_text())["figures"]
    for name in ("fd", "kid", "precision", "recall"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-6), name


def test_figures_join_a_runs_evaluations(root: Path) -> None:
    (root / "run").mkdir(exist_ok=True)
    for step in ((), ("--step", 7)):
        found = measured(root, "--reference", root / "kept_for_run.npz", "--images", root / "images/val", "--resize", 1,
                         "--run", root / "run", *step)  # fmt: skip
    lines = [json.loads(line) for line in (root / "run/evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [40, 7]
    assert lines[1]["fd"] == found["figures"]["fd"] and lines[1]["images"] == 60 and lines[1]["cfg"] == 2.0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": noise(20, 1, size=20)}, "made of images of 20 x 20 px, the samples have 16 x 16"),
        ({"arr_0": noise(3, 1)}, "3 images; precision and recall look at 3 neighbours"),
        ({"arr_0": np.zeros((9, 16, 16, 3), np.uint8)}, "all images have the same features"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "statistics of 7 features, --features gives 32"),
        ({"mu": np.zeros(32), "sigma": np.full((32, 32), np.nan)}, "not finite"),
        ({"mu": np.zeros(32)}, "one of mu and sigma"),
        ({"arr_9": np.zeros(3)}, "neither images"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "cannot be read as an .npz"),
    ],
)
def test_a_reference_that_does_not_fit_is_one_message(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    assert message in refused(root, capsys, "--reference", tmp_path / "bad.npz")


def test_other_bad_input_is_one_message(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "real.npz", arr_0=noise(20, 1))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "real.npz").read_bytes()[:3000])
    assert "cannot be read" in refused(root, capsys, "--reference", tmp_path / "cut.npz")
    assert "give an .npz" in refused(root, capsys)
    assert "does not exist" in refused(root, capsys, "--reference", tmp_path / "none.npz")

    other = write_extractor(tmp_path / "other.pt", seed=1)
    reference_args = ["--images", str(root / "images/val"), "--size", "16", "--out", str(tmp_path / "own.npz")]
    assert reference([*reference_args, "--features", str(other), "--device", "cpu"]) == 0
    assert "statistics of other features (other.pt" in refused(root, capsys, "--reference", tmp_path / "own.npz")

    save_png(tmp_path / "few/0/0.png", noise(1, 0)[0])
    assert "1 images" in refused(root, capsys, "--reference", tmp_path / "real.npz", "--samples", tmp_path / "few")
    for number, image in enumerate(noise(9, 0)):
        save_png(tmp_path / f"one/1/{number}.png", image)
    one = refused(root, capsys, "--images", root / "images/val", "--resize", 1, "--samples", tmp_path / "one")
    assert "all of class 1, and the reference has 2 classes" in one


def test_a_store_of_other_images_is_refused_and_so_is_what_it_says_already(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(root, capsys, "--store", root / "codes", "--images", root / "images/train")
    assert "was not made of --images" in said and "130 images" in said
    assert "--resize: --store says it already" in refused(
        root, capsys, "--store", root / "codes", "--images", root / "images", "--resize", 1
    )


def test_a_damaged_or_strange_features_file_is_one_message(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "real.npz", arr_0=noise(20, 1))
    (tmp_path / "cut.pt").write_bytes((root / "small.pt").read_bytes()[:2000])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pickle.pt")
    torch.jit.script(Wrong()).save(str(tmp_path / "wrong.pt"))
    torch.jit.script(NotANumber()).save(str(tmp_path / "nan.pt"))
    for name, message in {
        "cut.pt": "no TorchScript file, or a damaged one",
        "pickle.pt": "no TorchScript file",
        "wrong.pt": r"expected features (2, F)",
        "nan.pt": "not finite numbers",
        "absent.pt": "no such file",
    }.items():
        said = refused(root, capsys, "--reference", tmp_path / "real.npz", "--features", tmp_path / name)
        assert message in said, said


class Wrong(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean()


class NotANumber(torch.nn.Module):
    """Fine on noise of 64 px, which is what a file is tried with."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1)[:, :32] / (1.0 if images.shape[-1] == 64 else 0.0)


def test_folders_lists_and_tars_of_the_same_images_give_the_same_figures(root: Path, tmp_path: Path) -> None:
    files = sorted((root / "images/train").glob("*/*.png"))
    lines = [f"{path},{path.parent.name}" for path in files]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for path in files:
            name, label = f"{path.parent.name}-{path.stem}", ["cat", "dog"].index(path.parent.name)
            for suffix, content in ((".png", path.read_bytes()), (".cls", str(label).encode())):
                info = tarfile.TarInfo(name + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    sources = (root / "images/train", tmp_path / "list.csv", tmp_path / "train.tar")
    options = ("--resize", 1.25, "--skip-bad", 1)
    figures = [measured(root, "--images", source, *options)["figures"] for source in sources]
    assert figures[0] == figures[1] == figures[2]


def test_damaged_images_stop_an_evaluation_unless_they_may_be_left_out(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cat/007" in refused(root, capsys, "--images", root / "images", "--resize", 1.25)
    by_store = measured(root, "--images", root / "images", "--store", root / "codes")["figures"]
    assert measured(root, "--images", root / "images", "--resize", 1.25, "--skip-bad", 1)["figures"] == by_store
