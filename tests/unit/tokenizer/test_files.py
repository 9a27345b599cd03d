import json
import os

import pytest
import safetensors
import safetensors.torch
import torch

from mvar.errors import TokenizerError, WriteError
from mvar.scales import PATCH_NUMS_256
from mvar.tokenizer.files import load_quantizer, load_tokenizer, save_quantizer, save_tokenizer, sha256_of
from mvar.tokenizer.quantizer import Quantizer
from mvar.tokenizer.vqvae import VQVAE
from tests.golden import golden

GEOMETRY = {
    "channels": 32,
    "latent_channels": 4,
    "vocab_size": 16,
    "patch_nums": [1, 2, 3],
    "channel_mult": [1, 2],
    "res_blocks": 1,
}


def tiny(**changes) -> VQVAE:
    torch.manual_seed(7)
    return VQVAE(**(GEOMETRY | changes))


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def test_a_saved_tokenizer_loads_frozen_with_its_geometry(tmp_path):
    vqvae = tiny(phis=3, phi_ratio=0.25)
    save_tokenizer(tmp_path / "t.safetensors", vqvae)
    loaded = load_tokenizer(tmp_path / "t.safetensors")
    assert loaded.geometry == vqvae.geometry
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_weights(vqvae, loaded)


def test_equal_weights_make_equal_bytes_whatever_the_memory_format(tmp_path):
    save_tokenizer(tmp_path / "a.safetensors", tiny())
    save_tokenizer(tmp_path / "b.safetensors", tiny().to(memory_format=torch.channels_last))
    assert sha256_of(tmp_path / "a.safetensors") == sha256_of(tmp_path / "b.safetensors")


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, tiny())
    before = sha256_of(path)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(WriteError, match="No space left"):
        save_tokenizer(path, tiny(vocab_size=17))
    assert sha256_of(path) == before
    assert os.listdir(tmp_path) == [path.name]


def test_quantizer_files_round_trip_and_a_tokenizer_file_serves_too(tmp_path):
    vqvae = tiny()
    save_quantizer(tmp_path / "q.safetensors", vqvae.quantizer)
    save_tokenizer(tmp_path / "t.safetensors", vqvae)
    for name in ("q.safetensors", "t.safetensors"):
        loaded = load_quantizer(tmp_path / name)
        assert isinstance(loaded, Quantizer)
        assert loaded.geometry == vqvae.quantizer.geometry
        assert_same_weights(vqvae.quantizer, loaded)


def test_a_quantizer_file_is_no_tokenizer(tmp_path):
    save_quantizer(tmp_path / "q.safetensors", tiny().quantizer)
    with pytest.raises(TokenizerError, match=r"q\.safetensors.*'quantizer', expected a 'tokenizer'"):
        load_tokenizer(tmp_path / "q.safetensors")


@pytest.mark.parametrize("with_usage", [True, False])
def test_the_published_pth_layout_loads_with_inferred_geometry(tmp_path, with_usage):
    vqvae = tiny(patch_nums=PATCH_NUMS_256, phis=2)
    state = {k: v for k, v in vqvae.state_dict().items() if with_usage or "ema_vocab_hit" not in k}
    torch.save(state, tmp_path / "vae.pth")
    loaded = load_tokenizer(tmp_path / "vae.pth")
    assert loaded.geometry == vqvae.geometry
    assert_same_weights(vqvae, loaded)


def test_golden_weights_load_as_pth_and_reproduce_the_codes(tmp_path):
    io = golden("vqvae_tiny", "io.safetensors")
    torch.save(golden("vqvae_tiny", "state_enc_quant.safetensors", "state_dec.safetensors"), tmp_path / "vae.pth")
    vqvae = load_tokenizer(tmp_path / "vae.pth", {"patch_nums": (1, 2, 3, 4)})
    assert vqvae.quantizer.embedding.weight.dtype == torch.float32
    assert torch.equal(vqvae.encode(io["img"]), torch.cat([io[f"idx_{k}"] for k in range(4)], dim=1))


def test_a_published_file_with_another_number_of_scales_asks_for_them(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "vae.pth")
    with pytest.raises(TokenizerError, match=r"vae\.pth: it has 3 scales.*expected 10.*patch_nums"):
        load_tokenizer(tmp_path / "vae.pth")
    assert load_tokenizer(tmp_path / "vae.pth", {"patch_nums": [1, 2, 3]}).geometry == tiny().geometry


@pytest.mark.parametrize("name", ["t.safetensors", "t.pth"])
def test_a_geometry_other_than_asked_for_is_refused(tmp_path, name):
    if name.endswith("pth"):
        torch.save(tiny().state_dict(), tmp_path / name)
    else:
        save_tokenizer(tmp_path / name, tiny())
    with pytest.raises(TokenizerError, match=rf"{name}: its vocab_size is 16, expected 4096"):
        load_tokenizer(tmp_path / name, {"vocab_size": 4096, "patch_nums": (1, 2, 3)})


def test_weights_of_another_shape_name_the_first_differences(tmp_path):
    state = tiny().state_dict()
    state["decoder.conv_in.weight"] = torch.zeros(3)
    del state["quant_conv.bias"]
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(TokenizerError, match=r"quant_conv\.bias: missing.*decoder\.conv_in\.weight: got shape \[3\]"):
        load_tokenizer(tmp_path / "vae.pth", {"patch_nums": [1, 2, 3]})


def test_a_truncated_file_is_refused(tmp_path):
    save_tokenizer(tmp_path / "t.safetensors", tiny())
    torch.save(tiny().state_dict(), tmp_path / "t.pth")
    for name in ("t.safetensors", "t.pth"):
        whole = (tmp_path / name).read_bytes()
        for kept in (0, 5, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:kept])
            with pytest.raises(TokenizerError, match=rf"{name}: damaged"):
                load_tokenizer(tmp_path / name)


def test_one_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, tiny())
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match="do not match the digest"):
        load_tokenizer(path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = tiny().state_dict()
    state["quant_conv.bias"] = torch.full((4,), float("nan"))
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(TokenizerError, match=r"quant_conv\.bias holds values that are not finite"):
        load_tokenizer(tmp_path / "vae.pth", {"patch_nums": [1, 2, 3]})


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hostile-code-ran",))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Hostile()}, "vae.pth")
    with pytest.raises(TokenizerError, match="not readable"):
        load_tokenizer("vae.pth")
    assert not (tmp_path / "hostile-code-ran").exists()


@pytest.mark.parametrize(
    "tree", [{"epoch": 3}, [torch.zeros(1)], {"a": torch.zeros(1)}, {"encoder.conv_in.weight": torch.tensor(1.0)}]
)
def test_a_pth_that_is_no_tokenizer_is_refused(tmp_path, tree):
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(TokenizerError, match=r"x\.pth: (expected a state dict|not a tokenizer)"):
        load_tokenizer(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no geometry"),
        ({"format": 99}, "format 99, expected 1"),
        ({"geometry": GEOMETRY | {"vocab_size": 10**15}}, "impossible geometry"),
        ({"geometry": GEOMETRY | {"channels": "many"}}, "impossible geometry"),
        ({"geometry": GEOMETRY | {"patch_nums": [3, 1]}}, "impossible geometry"),
        ({"geometry": GEOMETRY | {"surprise": 1}}, "impossible geometry"),
        ({"geometry": GEOMETRY | {"channels": 64}}, "does not fit the geometry"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, message):
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, tiny())
    if isinstance(header, dict):
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.dumps(json.loads(file.metadata()["mvar"]) | header)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"mvar": header})
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(path)


def test_a_missing_file_says_so(tmp_path):
    for call in (load_tokenizer, load_quantizer):
        with pytest.raises(TokenizerError, match=r"nowhere\.safetensors: not found"):
            call(tmp_path / "nowhere.safetensors")
    with pytest.raises(TokenizerError, match="cannot be read"):
        sha256_of(tmp_path / "nowhere.safetensors")
