"""`mvar evaluate-model`: figures by hand, the same bits for any number of processes, and refusals that hang nobody."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvar.config import ModelConfig
from mvar.data.store import CodeStore
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from mvar.testing.code_stores import make_store
from mvar.testing.ranks import Ranks
from tests.exports import save_weights

PYRAMID, CLASSES, VOCAB, LATENT = (1, 2, 3), 4, 32, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate_model")
    make_store(root / "codes", train=8, val=19, classes=CLASSES, patch_nums=PYRAMID, vocab=VOCAB, latent=LATENT)
    config = ModelConfig(
        depth=2, width=64, heads=2, num_classes=CLASSES, patch_nums=PYRAMID, vocab_size=VOCAB, latent_channels=LATENT
    )
    model = MVAR.from_config(config, num_classes=CLASSES)
    init_weights_(model, 0, ModelConfig(init_gamma=1.0, init_head=2.0, init_conditioning=1.0))
    save_weights(root / "model.safetensors", config, model.state_dict())
    return root


def run(root: Path, ranks: int, *more: object) -> tuple[list[int], Path, str]:
    out = root / f"{ranks}.json"
    out.unlink(missing_ok=True)
    places = ("--weights", root / "model.safetensors", "--store", root / "codes", "--device", "cpu", "--threads", 1)
    argv = [*map(str, (*places, "--json", out, "--batch", 4, *more))]
    job = Ranks("mvar.testing.ranks:command", ["mvar.evaluate_model", argv], ranks, root / f"logs{ranks}")
    return job.wait(), out, job.output()


def test_figures_are_exact_whatever_the_number_of_processes(root: Path) -> None:
    figures = []
    for ranks in (1, 3):
        codes, out, said = run(root, ranks)
        assert codes == [0] * ranks, said
        tree: dict[str, Any] = json.loads(out.read_text())
        assert tree["context"]["images"] == 19 and tree["context"]["processes"] == ranks
        figures.append(tree["figures"])
    assert figures[0] == figures[1], "the same bits"
    by_hand(root, figures[0])


def by_hand(root: Path, figures: dict[str, float]) -> None:
    store = CodeStore.open(root / "codes")
    split = store.split("val")
    everything = np.arange(len(split))
    codes_BL = torch.from_numpy(split.codes(everything, np.zeros_like(everything)).astype(np.int64))
    config = ModelConfig(
        depth=2, width=64, heads=2, num_classes=CLASSES, patch_nums=PYRAMID, vocab_size=VOCAB, latent_channels=LATENT
    )
    model = MVAR.from_config(config, num_classes=CLASSES)
    init_weights_(model, 0, ModelConfig(init_gamma=1.0, init_head=2.0, init_conditioning=1.0))
    with torch.no_grad():
        x_BLC = store.quantizer().inputs_from_codes(codes_BL)
        logits_BLV = model.eval()(torch.from_numpy(split.labels_N), x_BLC)
    nll_BL = F.cross_entropy(logits_BLV.double().transpose(1, 2), codes_BL, reduction="none")
    correct_BL = (logits_BLV.argmax(dim=2) == codes_BL).double()
    assert figures["loss"] == pytest.approx(float(nll_BL.mean()), rel=1e-5)
    assert figures["bits_per_token"] == pytest.approx(float(nll_BL.mean()) / math.log(2), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(float(correct_BL.mean()), abs=1e-9)
    assert figures["loss_scale_2"] == pytest.approx(float(nll_BL[:, 1:5].mean()), rel=1e-5)
    assert figures["accuracy_scale_3"] == pytest.approx(float(correct_BL[:, 5:].mean()), abs=1e-9)


def test_a_store_of_another_geometry_is_refused_once_by_all_processes(root: Path) -> None:
    if not (root / "other").exists():
        make_store(root / "other", train=8, val=8, classes=CLASSES, patch_nums=(1, 2), vocab=VOCAB, latent=LATENT)
    codes, out, said = run(root, 2, "--store", root / "other")
    assert codes == [2, 2] and not out.exists()
    assert said.count("was made for another geometry") >= 1 and "Traceback" not in said
