"""`mvar import-published`: what published files are is read off them, and a wrong one says what differs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar import MVAR, VQVAE, MVARPipeline
from mvar.checkpoint.published import infer_config, published_state_dict, write_published
from mvar.cli import main as mvar
from mvar.config import ModelConfig
from mvar.files.disk import sha256_of
from mvar.files.shapes import differing
from mvar.import_published import PAPER, paper_of
from mvar.model.init import init_weights_
from mvar.scales import PATCH_NUMS_256, PATCH_NUMS_512
from tests.golden import golden, golden_json

SIDES = (1, 2, 3)
State = dict[str, Tensor]


def small_state(**changes: Any) -> State:
    """Two blocks in the published layout."""
    config = {"depth": 2, "num_classes": 5, "patch_nums": SIDES, "vocab_size": 16, "latent_channels": 4} | changes
    model = MVAR(**config)
    init_weights_(model, seed=1)
    return published_state_dict(model)


def write_files(folder: Path, **changes: Any) -> list[str]:
    """A model and a tokenizer in the published layout; the arguments that name them."""
    write_published(folder / "d2.pth", small_state(**changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqvae = VQVAE(32, 4, 16, SIDES, channel_mult=(1, 1), res_blocks=1)
    torch.save(vqvae.state_dict(), folder / "vae.pth")
    return ["--model", str(folder / "d2.pth"), "--tokenizer", str(folder / "vae.pth"), "--out", str(folder / "out")]


@pytest.mark.parametrize("l2_norm", [True, False])
def test_files_become_a_hub_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], l2_norm: bool) -> None:
    words = write_files(tmp_path, attn_l2_norm=l2_norm)
    assert mvar(["import-published", *words, "--license", "apache-2.0"]) == 0
    said = capsys.readouterr().out
    for text in ("depth    2, width 128, 2 heads", f"L2-norm  {'on' if l2_norm else 'off'}", "scales   1, 2, 3: 6 px"):
        assert text in said
    assert "--cfg 1.5 --top-k 900 --top-p 0.96, no smoothing; no figures of this model" in said
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["precision"] == "fp16" and config["license"] == "apache-2.0"
    assert config["sampling"]["cfg"] == 1.5 and config["sampling"]["top_k"] == 900
    for name in ("d2.pth", "vae.pth"):
        digest = sha256_of(tmp_path / name)
        assert config["source"][name] == {"bytes": (tmp_path / name).stat().st_size, "sha256": digest}
        assert digest in said and digest in (tmp_path / "out/README.md").read_text()
    expected = small_state(attn_l2_norm=l2_norm)
    read = MVAR.from_pretrained(tmp_path / "out").named_parameters()
    assert all(torch.equal(value, expected[name]) for name, value in read)
    assert MVARPipeline.from_pretrained(tmp_path / "out", device="cpu")(4).images[0].size == (6, 6)


def test_the_files_of_the_official_implementation_are_read(tmp_path: Path) -> None:
    """Both in the published layout, with all their buffers."""
    write_published(tmp_path / "m.pth", golden("mvar_tiny", "state.safetensors"))
    torch.save(golden("vqvae_tiny", "state_enc_quant.safetensors", "state_dec.safetensors"), tmp_path / "v.pth")
    words = ["--model", str(tmp_path / "m.pth"), "--tokenizer", str(tmp_path / "v.pth"), "--out", str(tmp_path / "out")]
    assert mvar(["import-published", *words]) == 0
    pipe = MVARPipeline.from_pretrained(tmp_path / "out", device="cpu")
    io = golden("mvar_tiny", "infer.safetensors")
    drawn = pipe(io["a.label"], guidance=1.5, top_k=1, output_type="pt").images
    assert isinstance(drawn, Tensor) and (drawn - io["a.img"]).abs().max() < 1e-4


def test_the_official_lists_of_names_and_shapes_are_recognised() -> None:
    names = golden_json("keys", "mvar_keys_d12.json")
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, (shape, *_) in names.items()}
        vqvae = VQVAE()
    for buffer in [name for name in state if name.endswith("attn.patch_nums") or name == "lvl_1L"]:
        del state[buffer]  # Meta tensors have no values: the number of tokens and of scales tells.
    config = infer_config(state, "d12")
    expected = ModelConfig(depth=12, width=768, heads=12, num_classes=1000, patch_nums=PATCH_NUMS_256)
    assert config == expected and paper_of(config) == PAPER[12]
    ours = {name: tuple(value.shape) for name, value in vqvae.state_dict().items()}
    assert differing({name: shape for name, (shape, _) in golden_json("keys", "vqvae_keys.json").items()}, ours) is None


@pytest.mark.parametrize("depth", PAPER)
@pytest.mark.parametrize("sides", [PATCH_NUMS_256, PATCH_NUMS_512])
def test_every_published_geometry_is_told_by_its_shapes(depth: int, sides: tuple[int, ...]) -> None:
    l2_norm = PAPER[depth].l2_norm
    with torch.device("meta"):
        model = MVAR(depth, patch_nums=sides, attn_l2_norm=l2_norm)
    config = infer_config(model.state_dict(), "d")
    assert (config.depth, config.attn_l2_norm, config.patch_nums) == (depth, l2_norm, sides)
    assert paper_of(config) == (PAPER[depth] if sides == PATCH_NUMS_256 else None)


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def other(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: state | {name: value(state[name])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("head.bias"), r"depth 2 of width 128, with L2-norm.*head\.bias: missing"),
        (without("class_emb.weight"), r"class_emb\.weight is missing"),
        (lambda state: state | {"extra": torch.zeros(1)}, "extra: not expected"),
        (other("blocks.1.ffn.fc1.weight", lambda x: x[:-1]), r"got shape \[511, 128\], expected \[512, 128\]"),
        (other("pos_1LC", lambda x: x[:, :-1]), r"pos_1LC: got shape \[1, 13, 128\], expected \[1, 14, 128\]"),
        (other("blocks.1.attn.patch_nums", lambda x: x.flip(0)), r"blocks\.1\.attn\.patch_nums is not the one"),
        (
            other("blocks.0.attn.zero_k_bias", lambda x: x + 1),
            r"zero_k_bias is not the one that the scales \[1, 2, 3\]",
        ),
        (other("blocks.0.attn.patch_nums", lambda x: x + 1), r"\[2, 5, 10\] tokens are no squares"),
        (other("pos_1LC", lambda x: x[0]), "pos_1LC is missing or has no dimension 2"),
        (lambda state: {k: v for k, v in state.items() if "mamba" not in k}, "looks like a VAR without Mamba"),
        (lambda state: {k.replace("blocks.1.", "blocks.7."): v for k, v in state.items()}, "block 1 is missing of 8"),
        (lambda state: {"quantize.embedding.weight": torch.zeros(1)}, "looks like a tokenizer"),
        (other("head.weight", lambda x: x * torch.nan), r"head\.weight holds values that are not finite"),
    ],
)
def test_what_differs_is_said_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[State], State], words: str
) -> None:
    arguments = write_files(tmp_path)
    write_published(tmp_path / "d2.pth", change(small_state()))
    assert mvar(["import-published", *arguments]) == 2
    said = capsys.readouterr().err
    assert "d2.pth" in said and re.search(words, said), said
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_says_how_much_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write_files(tmp_path)
    for name, words in (
        ("d2.pth", r"d2\.pth, which has 5,000 bytes: not a readable"),
        ("vae.pth", r"vae\.pth: damaged"),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:5000])
        assert mvar(["import-published", *arguments]) == 2
        assert re.search(words, capsys.readouterr().err)
        (tmp_path / name).write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mvar(["import-published", *write_files(tmp_path, vocab_size=17)]) == 2
    assert "vocab_size is 17 in the model and 16 in the tokenizer" in capsys.readouterr().err
    assert mvar(["import-published", *write_files(tmp_path, patch_nums=(1, 2, 3, 4))]) == 2
    assert "quantize.ema_vocab_hit_SV: got shape [3, 16], expected [4, 16]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
